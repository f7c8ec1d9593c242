"""One token of decoding in Triton: convolution, state, output and gate of docs/math.md (2) to (6) in one launch.

Everything a head needs is its own: its features, their last inputs and its state. So each program takes one head of one
sequence, and tails and state are updated in place in fixed buffers, as a CUDA graph needs them.

Shapes: b batch, h heads, p head width, n state width, k taps, f features: x, then B, then C, h * p + 2 * h * n of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mohawkify.ops.triton_tiles import on_device


@triton.jit
def _convolve(
    u_ptr,
    tail_ptr,
    weight_ptr,
    bias_ptr,
    feature,
    feature_begin,
    inside,
    kept,
    num_features,
    weight_stride_f,
    weight_stride_k,
    NUM_LAGS: tl.constexpr,
):
    """One head's convolved features, docs/math.md (2); its last inputs move on by one, but not at padding."""
    present = tl.load(u_ptr + feature, mask=inside, other=0.0)
    column = feature_begin + feature
    moves = (inside & kept) != 0  # compared, since the interpreter spreads a scalar as integers
    weights = weight_ptr + column * weight_stride_f
    output = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    output += tl.load(weights + NUM_LAGS * weight_stride_k, mask=inside, other=0.0).to(tl.float32) * present.to(
        tl.float32
    )
    for tap in tl.static_range(NUM_LAGS):
        past = tl.load(tail_ptr + tap * num_features + column, mask=inside, other=0.0)
        output += tl.load(weights + tap * weight_stride_k, mask=inside, other=0.0).to(tl.float32) * past.to(tl.float32)
        if tap > 0:
            tl.store(tail_ptr + (tap - 1) * num_features + column, past, mask=moves)
    if NUM_LAGS > 0:
        last = tail_ptr + (NUM_LAGS - 1) * num_features + column
        tl.store(last, present.to(tail_ptr.dtype.element_ty), mask=moves)
    return output


# A mask that grows by a column per token would compile one variant after the other for its place and stride.
@triton.jit(do_not_specialize=["keep_stride"], do_not_specialize_on_alignment=["keep_ptr"])
def _step(
    x_ptr,
    b_ptr,
    c_ptr,
    z_ptr,
    a_log_ptr,
    weight_ptr,
    bias_ptr,
    z_bias_ptr,
    d_ptr,
    tail_ptr,
    state_ptr,
    output_ptr,
    keep_ptr,
    keep_stride,
    heads,
    p_width,
    n_width,
    weight_stride_f,
    weight_stride_k,
    NUM_LAGS: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_N: tl.constexpr,
):
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, n = tl.arange(0, TILE_P), tl.arange(0, TILE_N)
    p_inside, n_inside = p < p_width, n < n_width
    x_features, key_features = heads * p_width, heads * n_width
    num_features = x_features + 2 * key_features
    kept = tl.full((), True, tl.int1)
    if keep_ptr is not None:
        kept = tl.load(keep_ptr + batch * keep_stride) != 0
    tail = tail_ptr + batch * NUM_LAGS * num_features
    x_feature, key_feature = head * p_width + p, head * n_width + n
    x = _convolve(
        x_ptr + batch * x_features, tail, weight_ptr, bias_ptr, x_feature, 0, p_inside, kept, num_features,
        weight_stride_f, weight_stride_k, NUM_LAGS,
    )  # fmt: skip
    b = _convolve(
        b_ptr + batch * key_features, tail, weight_ptr, bias_ptr, key_feature, x_features, n_inside, kept,
        num_features, weight_stride_f, weight_stride_k, NUM_LAGS,
    )  # fmt: skip
    c = _convolve(
        c_ptr + batch * key_features, tail, weight_ptr, bias_ptr, key_feature, x_features + key_features, n_inside,
        kept, num_features, weight_stride_f, weight_stride_k, NUM_LAGS,
    )  # fmt: skip
    x = tl.where(kept, x, 0.0)
    decay = 1.0 / (1.0 + tl.exp(tl.load(a_log_ptr + batch * heads + head).to(tl.float32)))  # sigmoid(-a_log)
    decay = tl.where(kept, decay, 1.0)
    state_offsets = (batch * heads + head) * p_width * n_width + p[:, None] * n_width + n[None, :]
    state_mask = p_inside[:, None] & n_inside[None, :]
    state = tl.load(state_ptr + state_offsets, mask=state_mask, other=0.0)
    state = decay * state + x[:, None] * b[None, :]
    tl.store(state_ptr + state_offsets, state, mask=state_mask)
    y = tl.sum(state * c[None, :], 1) + tl.load(d_ptr + head).to(tl.float32) * x
    z = tl.load(z_ptr + batch * x_features + x_feature, mask=p_inside, other=0.0).to(tl.float32)
    z += tl.load(z_bias_ptr + x_feature, mask=p_inside, other=0.0).to(tl.float32)
    y = y * z / (1.0 + tl.exp(-z))
    tl.store(output_ptr + batch * x_features + x_feature, y.to(output_ptr.dtype.element_ty), mask=p_inside)


def decode_step(
    x_bf: Tensor,
    b_bf: Tensor,
    c_bf: Tensor,
    z_bf: Tensor,
    a_log_bh: Tensor,
    convs: tuple[Tensor, Tensor],
    z_bias_f: Tensor,
    d_h: Tensor,
    tail_bkf: Tensor,
    state_bhpn: Tensor,
    keep_b: Tensor | None = None,
) -> Tensor:
    """The same map as `decode.decode_step` without its options, on a GPU; it has no gradient.

    Arguments and results as there; tails and state must be contiguous, and the state float32.
    """
    weight_fk, bias_f = convs
    batch, heads, p_width, n_width = state_bhpn.shape
    if not (tail_bkf.is_contiguous() and state_bhpn.is_contiguous() and state_bhpn.dtype == torch.float32):
        raise ValueError("decode_step updates in place: expected contiguous tails and a contiguous float32 state")
    output_bf = torch.empty_like(x_bf, memory_format=torch.contiguous_format)
    x_bf, b_bf, c_bf, z_bf, a_log_bh = (t.contiguous() for t in (x_bf, b_bf, c_bf, z_bf, a_log_bh))
    bias_f, z_bias_f, d_h = (t.contiguous() for t in (bias_f, z_bias_f, d_h))
    tile_p, tile_n = triton.next_power_of_2(p_width), triton.next_power_of_2(n_width)
    with on_device(state_bhpn):
        _step[(batch, heads)](
            *(x_bf, b_bf, c_bf, z_bf, a_log_bh, weight_fk, bias_f, z_bias_f, d_h, tail_bkf, state_bhpn, output_bf),
            *(keep_b, 0 if keep_b is None else keep_b.stride(0)),
            *(heads, p_width, n_width, *weight_fk.stride()),
            NUM_LAGS=weight_fk.shape[1] - 1,
            TILE_P=tile_p,
            TILE_N=tile_n,
            num_warps=min(max(tile_p * tile_n // 1024, 1), 8),
        )
    return output_bf
