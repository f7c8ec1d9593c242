"""The Discrete Mamba-2 mixer, written to be read beside its equations (docs/math.md).

Shapes: b batch, l length, d model width, h heads, p head width, n state width, f features (h * p or h * n), k taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohawkify.ops.conv import causal_conv
from mohawkify.ops.decode import decode_step
from mohawkify.ops.scan import scan_chunked

GATE_IDENTITY_BIAS = 1.278464542761  # SiLU(1.278464542761) = 1: the gate starts as the identity

# Patterns of the parameters that stay in float32 in a bfloat16 or quantised student: a few per cent of a mixer, and
# what its memory hangs on. On a stories260k student they are a quarter of bfloat16's KL (measured: 2.5e-4, 1.9e-4).
PRECISE_PARAMETERS = [r"decay_proj\.", r"[xbc]_conv\.", r"\.z_bias$", r"\.d$"]


class MixingParts(NamedTuple):
    """What a mixer's matrix is made of."""

    b_blhn: Tensor
    c_blhn: Tensor
    log_decay_blh: Tensor
    d_h: Tensor


def read_mask(mask: Tensor, batch: int, length: int) -> tuple[Tensor | None, Tensor]:
    """Document borders and padding from the mask that a model built for its attention.

    A token that may not look at itself is padding; one that may not look at its neighbour before starts a document.
    The first token may never look at the last one, which says how this mask writes "may not": families differ.

    Args:
        mask: (b or 1, 1, l, s) with any two values, whose last l columns are these tokens; or (b, s), 0 at padding.
        batch: b.
        length: l, at least 2.

    Returns:
        Where documents start (b, l), or None where the mask does not say, and where tokens are real (b, l).
    """
    if mask.dim() == 2:
        return None, mask[:, -length:] != 0
    allowed_bll = (mask[:, 0, :, -length:] != mask[:, 0, :1, -1:]).expand(batch, -1, -1)
    keep_bl = allowed_bll.diagonal(dim1=1, dim2=2)
    follows_bl = allowed_bll.diagonal(offset=-1, dim1=1, dim2=2)
    return F.pad(~follows_bl, (1, 0), value=True), keep_bl


class DepthwiseConv(nn.Module):
    """The parameters of one short causal convolution; it starts as the identity."""

    def __init__(self, num_features: int, num_taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, num_taps))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Only the tap of the current token is 1, everything else 0."""
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, -1] = 1.0
            self.bias.zero_()

    def forward(
        self, u_blf: Tensor, tail_bkf: Tensor | None, document_starts_bl: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Convolve; see `causal_conv`."""
        return causal_conv(u_blf, self.weight, self.bias, tail_bkf, document_starts_bl)


class DiscreteMamba2(nn.Module):
    """A drop-in replacement for a decoder layer's attention module.

    Every head maps its part of x by a matrix that is a scalar decay times C.B: see `mohawkify.ops.scan`. The
    projections are separate modules, so that a stage can train some and leave the others alone, weight decay included.

    Args:
        hidden_size: model width d.
        num_heads: heads h; as many as the teacher has query heads.
        head_dim: width p of x, z and y per head.
        state_size: width n of B and C per head.
        conv_kernel: taps k of the convolutions of x, B and C.
        decay_bias: whether a_log has a learned bias.
        out_bias: whether the output projection has a bias.
        reads_mask: whether document borders and padding are read from the mask of attention, in families whose
            decoder layers do not hand the keywords on that say it directly.
        layer_idx: position of the layer, the key into the cache.

    Source: Llamba (arXiv 2502.14458), section 3; Discrete Mamba-2 of MOHAWK (arXiv 2408.10189), section 3.2.
    """

    # The plain operators; `mohawkify.student.build` puts those here that choose by device.
    scan: Callable[..., tuple[Tensor, Tensor]] = staticmethod(scan_chunked)
    step: Callable[..., Tensor] = staticmethod(decode_step)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        state_size: int,
        conv_kernel: int,
        decay_bias: bool,
        out_bias: bool,
        reads_mask: bool,
        layer_idx: int,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.state_size = num_heads, head_dim, state_size
        self.reads_mask, self.layer_idx = reads_mask, layer_idx
        self.x_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_heads * state_size, bias=False)
        self.c_proj = nn.Linear(hidden_size, num_heads * state_size, bias=False)
        self.z_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.decay_proj = nn.Linear(hidden_size, num_heads, bias=decay_bias)
        self.x_conv = DepthwiseConv(num_heads * head_dim, conv_kernel)
        self.b_conv = DepthwiseConv(num_heads * state_size, conv_kernel)
        self.c_conv = DepthwiseConv(num_heads * state_size, conv_kernel)
        self.z_bias = nn.Parameter(torch.empty(num_heads * head_dim))
        self.d = nn.Parameter(torch.empty(num_heads))
        self.out_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=out_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as published: convolution, gate and skip are the identity, projections are random."""
        for module in (self.x_proj, self.b_proj, self.c_proj, self.decay_proj, self.out_proj):
            module.reset_parameters()
        for conv in (self.x_conv, self.b_conv, self.c_conv):
            conv.reset_parameters()
        for parameter, value in (
            (self.z_proj.weight, 0.0),
            (self.z_bias, GATE_IDENTITY_BIAS),
            (self.d, 1.0),
            (self.decay_proj.bias, 0.0),
            (self.out_proj.bias, 0.0),
        ):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def mixing_parts(self, hidden_bld: Tensor, document_starts_bl: Tensor | None = None) -> MixingParts:
        """What the mixing matrix is made of, without the work stage 1 does not need (x, z, scan, output)."""
        b_blf, _ = self.b_conv(self.b_proj(hidden_bld), None, document_starts_bl)
        c_blf, _ = self.c_conv(self.c_proj(hidden_bld), None, document_starts_bl)
        return MixingParts(
            self._heads(b_blf, self.state_size),
            self._heads(c_blf, self.state_size),
            self._log_decay(hidden_bld),
            self.d.clone(),  # an engine that shards the student takes the parameter itself back after this call
        )

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Map hidden states as the attention module did, and move the cache on.

        Args:
            hidden_states: (b, l, d).
            attention_mask: the mask the model built for attention; read only with ``reads_mask``.
            position_ids: (b or 1, l); position 0 starts a document. Read only where the sequence starts afresh.
            past_key_values: a `StudentCache`, or None.
            layer_past: the same under the name that older families use.
            padding_mask: (b, at least l), 0 at padding; its last l columns count.

        Returns:
            The output (b, l, d), and None in place of attention weights.
        """
        hidden_bld = hidden_states
        cache = layer_past if past_key_values is None else past_key_values
        memory: Any = None if cache is None else cache.layers[self.layer_idx]
        continues = memory is not None and memory.num_tokens > 0
        batch, length, _ = hidden_bld.shape
        if memory is not None and length == 1 and not torch.is_grad_enabled():
            if padding_mask is None:  # some families' layers keep keywords from their attention
                padding_mask = getattr(cache, "padding_mask", None)
            keep_b = None if padding_mask is None else padding_mask[:, -1]
            return self._step(hidden_bld[:, 0], keep_b, memory).unsqueeze(1), None
        document_starts_bl = keep_bl = None
        if length > 1:
            if self.reads_mask and attention_mask is not None:
                document_starts_bl, keep_bl = read_mask(attention_mask, batch, length)
            else:
                document_starts_bl = None if position_ids is None else (position_ids == 0).expand(batch, -1)
                keep_bl = None if padding_mask is None else padding_mask[:, -length:]

        out_bld, tail_bkf, state_bhpn = self._mix(
            hidden_bld,
            memory.tail_bkf if continues else None,
            memory.state_bhpn if continues else None,
            None if continues else document_starts_bl,
            None if keep_bl is None else keep_bl.to(hidden_bld.dtype),
        )
        if memory is not None:
            memory.write(tail_bkf, state_bhpn, length)
        return out_bld, None

    def _step(self, hidden_bd: Tensor, keep_b: Tensor | None, memory: Any) -> Tensor:
        """One token, its memory moved on in place. Nobody looks whether it is padding: that would wait for a GPU."""
        batch, heads = hidden_bd.shape[0], self.num_heads
        x_bf, b_bf, c_bf = self.x_proj(hidden_bd), self.b_proj(hidden_bd), self.c_proj(hidden_bd)
        convs = (self.x_conv, self.b_conv, self.c_conv)
        # Stored tap by tap, as the step reads them.
        weight_fk = torch.cat([conv.weight.T for conv in convs], dim=1).T
        bias_f = torch.cat([conv.bias for conv in convs])
        tail_bkf, state_bhpn = memory.step_memory(
            (batch, weight_fk.shape[1] - 1, weight_fk.shape[0]),
            (batch, heads, self.head_dim, self.state_size),
            x_bf,
        )
        gated_bf = self.step(
            x_bf, b_bf, c_bf, self.z_proj(hidden_bd), self._a_log(hidden_bd),
            (weight_fk, bias_f), self.z_bias, self.d, tail_bkf, state_bhpn, keep_b,
        )  # fmt: skip
        memory.advance(1)
        return self.out_proj(gated_bf.to(self.out_proj.weight.dtype))

    def _mix(
        self,
        hidden_bld: Tensor,
        tail_bkf: Tensor | None,
        state_bhpn: Tensor | None,
        document_starts_bl: Tensor | None,
        keep_bl: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        features = [self.x_proj(hidden_bld), self.b_proj(hidden_bld), self.c_proj(hidden_bld)]
        if keep_bl is not None:
            features = [feature * keep_bl.unsqueeze(-1) for feature in features]
        tails = (None,) * 3 if tail_bkf is None else tail_bkf.split([f.shape[-1] for f in features], dim=-1)
        convs = (self.x_conv, self.b_conv, self.c_conv)
        (x_blf, x_tail), (b_blf, b_tail), (c_blf, c_tail) = (
            conv(feature, tail, document_starts_bl) for conv, feature, tail in zip(convs, features, tails, strict=True)
        )
        log_decay_blh = self._log_decay(hidden_bld)
        if keep_bl is not None:
            # A padded token neither writes to the state nor lets it decay.
            x_blf = x_blf * keep_bl.unsqueeze(-1)
            log_decay_blh = log_decay_blh * keep_bl.unsqueeze(-1)
        x_blhp = self._heads(x_blf, self.head_dim)
        b_blhn, c_blhn = self._heads(b_blf, self.state_size), self._heads(c_blf, self.state_size)
        y_blhp, state_bhpn = self.scan(x_blhp, b_blhn, c_blhn, log_decay_blh, state_bhpn, document_starts_bl)
        y_blhp = y_blhp + self.d.to(y_blhp.dtype).unsqueeze(-1) * x_blhp
        gate_blf = F.silu(self.z_proj(hidden_bld) + self.z_bias)
        out_bld = self.out_proj((y_blhp.flatten(2) * gate_blf).to(self.out_proj.weight.dtype))
        return out_bld, torch.cat([x_tail, b_tail, c_tail], dim=-1), state_bhpn

    def _log_decay(self, hidden_bld: Tensor) -> Tensor:
        """-softplus(a_log), in at least float32: errors of the decay compound along the sequence."""
        return -F.softplus(self._a_log(hidden_bld))

    def _a_log(self, hidden: Tensor) -> Tensor:
        a_log = self.decay_proj(hidden.to(self.decay_proj.weight.dtype))
        return a_log.to(torch.promote_types(a_log.dtype, torch.float32))

    def _heads(self, features_blf: Tensor, width: int) -> Tensor:
        return features_blf.unflatten(-1, (self.num_heads, width))
