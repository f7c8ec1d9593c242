"""The calibrated start of Discrete Mamba-2: its heads, gates and output fitted to attention on text (docs/math.md).

Shapes: b batch, h query heads, g key heads, l target position, r chosen target positions, s source position, p width of
keys and values, m = p + 1 with the constant, n state size, d model width, c candidate half-lives, f features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mohawkify.families.adapter import AttentionWeights
from mohawkify.mixers.calibration import AttentionCall, Calibration, HeadsBeside, PassCost, ridge
from mohawkify.mixers.mamba2 import GATE_IDENTITY_BIAS, DiscreteMamba2, DiscreteMamba2Config

SHORTEST_HALF_LIFE = 0.25  # tokens; the next candidate is twice as long, up to that of twice the sequences
POSITIONS_PER_SEQUENCE = 64  # whose outputs the heads are fitted to
# Ridge strengths, relative to the features' mean squares; measured on SmolLM2-135M, see docs/log.md.
RIDGE_HEADS, RIDGE_GATES, RIDGE_OUTPUT = 1e-3, 1e-2, 3e-2
_SILU_SLOPE = float(torch.autograd.functional.jacobian(F.silu, torch.tensor(GATE_IDENTITY_BIAS)))


@torch.no_grad()
def start_silent(mixer: DiscreteMamba2, weights: AttentionWeights, num_layers: int) -> None:
    """Values and output of the attention, and C = 0: a mixer that adds nothing until it is calibrated."""
    mixer.reset_parameters()
    v_gpd, repeats = weights.v_gpd, mixer.config.num_heads // weights.v_gpd.shape[0]
    mixer.x_proj.weight.copy_(v_gpd.repeat_interleave(repeats, dim=0).flatten(0, 1))
    if weights.v_bias_gp is not None:
        mixer.x_conv.bias.copy_(weights.v_bias_gp.repeat_interleave(repeats, dim=0).flatten())
    mixer.out_proj.weight.copy_(weights.out_dhp.flatten(1))
    if weights.out_bias_d is not None:
        mixer.out_proj.bias.copy_(weights.out_bias_d)
    mixer.c_proj.weight.zero_()
    mixer.d.zero_()
    mixer.decay_proj.weight.zero_()


class CalibratedStart(Calibration):
    """Fits what every head writes to what the attention's head writes, then its gate, then the output of all heads.

    Which matrix a head has does not matter, only its product with the values: attention spends much of its weight on
    tokens whose values are small. All fits are linear least squares, of which only sums over tokens are kept.
    """

    passes: ClassVar[Mapping[str, float]] = {"decays": 1 / 16, "heads": 1 / 4, "gates": 1 / 2, "output": 1.0}

    def __init__(self, mixer: DiscreteMamba2, weights: AttentionWeights, beside: HeadsBeside | None = None) -> None:
        super().__init__(mixer, weights, beside)
        self.outputs = [mixer.out_proj] if beside is None else [mixer.out_proj, beside.out_proj]
        num_heads, width = weights.q_hpd.shape[:2]
        self.repeats = num_heads // weights.k_gpd.shape[0]
        scaling = 1.0 / math.sqrt(width) if weights.scaling is None else weights.scaling
        self.q_hpd, self.q_bias_hp = weights.q_hpd * scaling, _bias(weights.q_bias_hp, weights.q_hpd) * scaling
        self.k_bias_gp = _bias(weights.k_bias_gp, weights.k_gpd)
        self.half_life_c = torch.empty(0)
        self.log_decay_h = torch.zeros(num_heads)  # -log of the decay of one token
        self.start_hk = torch.zeros(num_heads, 2)  # weights of the two features of the first pass
        self.q_moment_hmm = self.k_moment_gmm = torch.empty(0)
        self.name, self.num_calls = "", 0

    @classmethod
    def refuse(cls, config: DiscreteMamba2Config) -> str | None:
        """See `Calibration.refuse`: a head must be a linear map of its state, and its half-life free."""
        if config.conv_activation == "none" and config.decay_bias and not config.gated_norm:
            return None
        return "needs student.conv_activation: none, student.gated_norm: false and student.decay_bias: true"

    @classmethod
    def costs(cls, attention: tuple[int, int, int], hidden_size: int, length: int) -> list[PassCost]:
        """See `Calibration.costs`: a token adds outer products of its features, one for every output that they make."""
        heads, _, width = attention
        chosen = min(1.0, POSITIONS_PER_SEQUENCE / length)
        rows = {"decays": width, "heads": chosen * width, "gates": width, "output": 1}
        matrices = heads * length**2  # of attention; float32, like all below
        written = length * (width + 1) * width * (1 + chosen) + chosen * length * width * _num_features(width)
        # The first pass has scores, decays and their product beside the probabilities, and its features.
        working = {"decays": 4 * matrices + 3 * heads * length * width, "heads": matrices + written}
        found = []
        for name, shapes in sum_shapes(attention, heads * width, hidden_size, length).items():
            numbers = sum(math.prod(shape) for shape in shapes.values())
            flops = 2.0 * rows[name] * math.prod(shapes["gram"])
            if name == "decays":  # the features themselves: two products of matrices for each half-life
                flops += 4.0 * shapes["gram"][1] * heads * length * width
            if name == "heads":
                flops += 2.0 * chosen * heads * length * (width + 1) * width
            found.append(PassCost(cls.passes[name], 8 * numbers, flops, int(4 * working.get(name, 2 * matrices))))
        return found

    def begin(self, name: str, length: int) -> None:
        """See `Calibration.begin`."""
        self.name, self.num_calls = name, 0
        heads, width = self.q_hpd.shape[:2]
        inner = sum(output.in_features for output in self.outputs)
        self.half_life_c = SHORTEST_HALF_LIFE * 2.0 ** torch.arange(_num_candidates(length))
        attention = (heads, heads // self.repeats, width)
        shapes = sum_shapes(attention, inner, self.mixer.hidden_size, length)
        device = self.mixer.out_proj.weight.device
        precise = torch.float32 if device.type == "mps" else torch.float64
        self.sums = {key: torch.zeros(shape, dtype=precise, device=device) for key, shape in shapes[name].items()}

    @torch.no_grad()
    def add(self, call: AttentionCall) -> None:
        """See `Calibration.add`."""
        {"decays": self._add_decays, "heads": self._add_heads, "gates": self._add_gates, "output": self._add_output}[
            self.name
        ](call)
        self.num_calls += 1

    @torch.no_grad()
    def solve(self) -> float | None:
        """See `Calibration.solve`."""
        error = {
            "decays": self._solve_decays,
            "heads": self._solve_heads,
            "gates": self._solve_gates,
            "output": self._solve_output,
        }[self.name]()
        self.sums = {}
        return error

    # The first pass: one half-life per head.

    def _add_decays(self, call: AttentionCall) -> None:
        """Two features per head and half-life: the decaying mean of the values, and the same weighted by q.k."""
        q_bhlp, k_bgsp, v_bgsp, y_bhlp = self._attention_parts(call)
        k_bhsp, v_bhsp = (part.repeat_interleave(self.repeats, dim=1) for part in (k_bgsp, v_bgsp))
        score_bhls = q_bhlp @ k_bhsp.transpose(-1, -2)
        for index, half_life in enumerate(self.half_life_c.tolist()):
            mean_b1ls = decaying_means(math.log(2.0) / half_life, call.document_starts_bl).unsqueeze(1)
            features_bhklp = torch.stack([mean_b1ls @ v_bhsp, (score_bhls * mean_b1ls) @ v_bhsp], dim=2)
            features_hkf = features_bhklp.permute(1, 2, 0, 3, 4).flatten(2)
            self.sums["gram"][:, index] += features_hkf @ features_hkf.transpose(1, 2)
            target_hf = y_bhlp.transpose(0, 1).flatten(1)
            self.sums["target"][:, index] += (features_hkf @ target_hf.unsqueeze(-1)).squeeze(-1)
        self.sums["square"] += y_bhlp.double().square().sum((0, 2, 3)).to(self.sums["square"])
        for key, part in (("q_moment", q_bhlp), ("k_moment", k_bgsp)):
            part_xm = with_constant(part).transpose(0, 1).flatten(1, 2)
            self.sums[key] += part_xm.transpose(1, 2) @ part_xm

    def _solve_decays(self) -> None:
        gram, target = self.sums["gram"].double().cpu(), self.sums["target"].double().cpu()
        strength = 1e-6 * gram.diagonal(dim1=-2, dim2=-1)
        solution_hck = ridge(gram, target.unsqueeze(-1), strength).squeeze(-1)
        # |y - F x|^2 = |y|^2 - 2 x.F'y + x.F'F x
        explained_hc = (2.0 * target - (gram @ solution_hck.unsqueeze(-1)).squeeze(-1)).mul(solution_hck).sum(-1)
        best_h = explained_hc.argmax(-1)
        self.log_decay_h = math.log(2.0) / self.half_life_c[best_h]
        self.start_hk = solution_hck[torch.arange(len(best_h)), best_h].float()
        self.q_moment_hmm, self.k_moment_gmm = self.sums["q_moment"].cpu(), self.sums["k_moment"].cpu()

    # The second pass: what C and B are, given the half-lives.

    def _add_heads(self, call: AttentionCall) -> None:
        """The features that a head with B = (k, 1) can have from its state; C is then a linear map of (q, 1)."""
        q_bhlp, k_bgsp, v_bgsp, y_bhlp = self._attention_parts(call)
        length = q_bhlp.shape[2]
        stride = max(1, length // POSITIONS_PER_SEQUENCE)
        chosen_r = torch.arange(self.num_calls % stride, length, stride, device=q_bhlp.device)
        for head in range(q_bhlp.shape[1]):
            group = head // self.repeats
            mean_brs = decaying_means(float(self.log_decay_h[head]), call.document_starts_bl)[:, chosen_r]
            v_bsp = v_bgsp[:, group]
            written_bsf = (with_constant(k_bgsp[:, group]).unsqueeze(-1) * v_bsp.unsqueeze(-2)).flatten(2)
            state_brmp = (mean_brs @ written_bsf).unflatten(-1, (-1, v_bsp.shape[-1]))
            features_brfp = head_features(q_bhlp[:, head, chosen_r], state_brmp, v_bsp[:, chosen_r])
            features_xf = features_brfp.transpose(2, 3).flatten(0, 2)
            self.sums["gram"][head] += features_xf.T @ features_xf
            self.sums["target"][head] += features_xf.T @ y_bhlp[:, head, chosen_r].flatten()

    def _solve_heads(self) -> None:
        gram, target = self.sums["gram"].double().cpu(), self.sums["target"].double().cpu()
        width = self.q_hpd.shape[1]
        start_hf = torch.zeros_like(target)
        start_hf[:, :width] = self.start_hk[:, 1:]
        start_hf[:, -2] = self.start_hk[:, 0]
        rest = target - (gram @ start_hf.unsqueeze(-1)).squeeze(-1)
        strength = RIDGE_HEADS * gram.diagonal(dim1=-2, dim2=-1)
        solution_hf = start_hf + ridge(gram, rest.unsqueeze(-1), strength).squeeze(-1)
        for head in range(len(solution_hf)):
            map_mm, skip = map_of_features(solution_hf[head], width)
            self._set_head(head, map_mm, skip)

    def _set_head(self, head: int, map_mm: Tensor, skip: float) -> None:
        """Set C = T map (q, 1) and B = T^-T (k, 1), with a T under which both are equally large in every dimension."""
        mixer, group, width = self.mixer, head // self.repeats, self.q_hpd.shape[1]
        state, log_decay = mixer.config.state_size, float(self.log_decay_h[head])
        c_moment = map_mm @ self.q_moment_hmm[head].double() @ map_mm.T
        c_nm, b_nm = balanced(c_moment, self.k_moment_gmm[group].double(), min(state, width + 1))
        c_nm = c_nm @ map_mm
        if mixer.config.write == "plain":
            c_nm = c_nm * log_decay  # of a plain sum, which is so much larger than the mean
        rows = slice(head * state, head * state + len(c_nm))
        for projection, conv, map_nm, weight_pd, bias_p in (
            (mixer.c_proj, mixer.c_conv, c_nm, self.q_hpd[head], self.q_bias_hp[head]),
            (mixer.b_proj, mixer.b_conv, b_nm, self.weights.k_gpd[group], self.k_bias_gp[group]),
        ):
            precise_pd = weight_pd.double().cpu()
            weight_nd = map_nm[:, :width] @ precise_pd
            bias_n = map_nm[:, :width] @ bias_p.double().cpu() + map_nm[:, width]
            # The rows are as large as those of the attention, the last tap has the rest: Adam's steps are equally large
            # for all parameters, and would otherwise move small rows far.
            tap = float(weight_nd.norm() / math.sqrt(len(weight_nd)) / (precise_pd.norm() / math.sqrt(width)))
            tap = tap or 1.0
            projection.weight[rows] = (weight_nd / tap).to(projection.weight)
            conv.weight[rows, -1] = tap
            conv.bias[rows] = bias_n.to(conv.bias)
        mixer.c_proj.weight[rows.stop : (head + 1) * state] = 0.0
        mixer.d[head] = skip
        mixer.decay_proj.bias[head] = math.log(math.expm1(log_decay))

    # The third pass: how much every head writes at a token.

    def _add_gates(self, call: AttentionCall) -> None:
        """To first order a gate multiplies a head's output by a linear map of (q, 1), which is fitted to what it lacks.

        Queries know when a head has nothing to attend to. Maps of the whole hidden state are no better (measured).
        """
        q_bhlp, _, _, y_bhlp = self._attention_parts(call)
        ours_blhp = self._gated_features(call).unflatten(-1, (y_bhlp.shape[1], -1))
        square_xh = ours_blhp.square().sum(-1).flatten(0, 1)
        product_xh = (ours_blhp * y_bhlp.transpose(1, 2)).sum(-1).flatten(0, 1)
        query_xhm = with_constant(q_bhlp.transpose(1, 2)).flatten(0, 1)
        for head in range(y_bhlp.shape[1]):
            query_xm = query_xhm[:, head]
            self.sums["gram"][head] += query_xm.T @ (query_xm * square_xh[:, head, None])
            self.sums["target"][head] += query_xm.T @ (product_xh - square_xh)[:, head]

    def _solve_gates(self) -> None:
        gram, head_dim = self.sums["gram"], self.mixer.config.head_dim
        strength = RIDGE_GATES * gram.diagonal(dim1=-2, dim2=-1)
        factor_hm = ridge(gram, self.sums["target"].unsqueeze(-1), strength).squeeze(-1).float() / _SILU_SLOPE
        factor_hm = factor_hm.to(self.q_hpd.device)
        weight_hd = (factor_hm[:, :-1].unsqueeze(1) @ self.q_hpd).squeeze(1)
        bias_h = (factor_hm[:, :-1] * self.q_bias_hp).sum(-1) + factor_hm[:, -1]
        self.mixer.z_proj.weight.copy_(weight_hd.repeat_interleave(head_dim, dim=0))
        self.mixer.z_bias.copy_(GATE_IDENTITY_BIAS + bias_h.repeat_interleave(head_dim))

    # The fourth pass: the output projection, which knows all heads together, those of attention beside the mixer too.

    def _add_output(self, call: AttentionCall) -> None:
        parts = [self._gated_features(call)]
        if self.beside is not None and call.beside_bhls is not None:
            v_bgsp = values(self.beside.weights, call.hidden_bld.float())
            parts.append((call.beside_bhls @ repeated(v_bgsp, call.beside_bhls.shape[1])).transpose(1, 2).flatten(2))
        features_xf = with_constant(torch.cat(parts, dim=-1)).flatten(0, 1)
        self.sums["gram"] += features_xf.T @ features_xf
        output_xd = call.output_bld.float().flatten(0, 1)
        self.sums["target"] += features_xf.T @ output_xd
        self.sums["square"] += output_xd.square().sum()

    def _solve_output(self) -> float:
        out_proj = self.mixer.out_proj
        bias_d = out_proj.weight.new_zeros(out_proj.out_features) if out_proj.bias is None else out_proj.bias
        start_fd = torch.cat([*(output.weight for output in self.outputs), bias_d.unsqueeze(1)], dim=1).T.double().cpu()
        gram, target = self.sums["gram"].double().cpu(), self.sums["target"].double().cpu()
        size = len(gram) if out_proj.bias is not None else len(gram) - 1
        gram, rest = gram[:size, :size], (target - gram @ start_fd)[:size]
        mean = gram.diagonal()[: out_proj.in_features].mean()
        solution_fd = start_fd[:size] + ridge(gram, rest, RIDGE_OUTPUT * float(mean))
        inner = [output.in_features for output in self.outputs]
        for output, part_fd in zip(self.outputs, solution_fd[: sum(inner)].split(inner), strict=True):
            output.weight.copy_(part_fd.T)
        if out_proj.bias is not None:
            out_proj.bias.copy_(solution_fd[-1])
        square = float(self.sums["square"])
        left = square + float(((gram @ solution_fd - 2.0 * target[:size]) * solution_fd).sum())
        return math.sqrt(max(left, 0.0) / square) if square else 0.0

    def _attention_parts(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries (b, h, l, p) and keys before any rotation, values (b, g, s, p), and the heads' outputs."""
        hidden_b1ld = call.hidden_bld.float().unsqueeze(1)
        q_bhlp = hidden_b1ld @ self.q_hpd.transpose(1, 2) + self.q_bias_hp.unsqueeze(1)
        k_bgsp = hidden_b1ld @ self.weights.k_gpd.transpose(1, 2) + self.k_bias_gp.unsqueeze(1)
        v_bgsp = values(self.weights, call.hidden_bld.float())
        y_bhlp = call.probabilities_bhls @ repeated(v_bgsp, q_bhlp.shape[1])
        return q_bhlp, k_bgsp, v_bgsp, y_bhlp

    def _gated_features(self, call: AttentionCall) -> Tensor:
        """What the mixer hands to its output projection (b, l, f)."""
        inputs: list[Tensor] = []
        handle = self.mixer.out_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            call.call_mixer()
        finally:
            handle.remove()
        return inputs[0].float()


def values(weights: AttentionWeights, hidden_bld: Tensor) -> Tensor:
    """The values (b, g, s, p) of an attention's hidden states."""
    bias_gp = _bias(weights.v_bias_gp, weights.v_gpd)
    return hidden_bld.unsqueeze(1) @ weights.v_gpd.transpose(1, 2) + bias_gp.unsqueeze(1)


def repeated(v_bgsp: Tensor, num_heads: int) -> Tensor:
    """The values of every query head (b, h, s, p)."""
    return v_bgsp.repeat_interleave(num_heads // v_bgsp.shape[1], dim=1)


def sum_shapes(
    attention: tuple[int, int, int], inner: int, hidden_size: int, length: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of what every pass adds up.

    Args:
        attention: query heads, key heads, and their width.
        inner: inputs of the output projections.
        hidden_size: d.
        length: tokens per sequence.
    """
    heads, groups, width = attention
    num_candidates, features = _num_candidates(length), _num_features(width)
    return {
        "decays": {
            "gram": (heads, num_candidates, 2, 2),
            "target": (heads, num_candidates, 2),
            "square": (heads,),
            "q_moment": (heads, width + 1, width + 1),
            "k_moment": (groups, width + 1, width + 1),
        },
        "heads": {"gram": (heads, features, features), "target": (heads, features)},
        "gates": {"gram": (heads, width + 1, width + 1), "target": (heads, width + 1)},
        "output": {"gram": (inner + 1, inner + 1), "target": (inner + 1, hidden_size), "square": (1,)},
    }


def _num_candidates(length: int) -> int:
    return 2 + math.ceil(math.log2(length / SHORTEST_HALF_LIFE))


def _num_features(width: int) -> int:
    return 3 * width + width // 2 + 2


def decaying_means(log_decay: float, document_starts_bl: Tensor) -> Tensor:
    """The matrices (b, l, s) of sums over the past with weights ``log_decay * exp(-log_decay * distance)``.

    Args:
        log_decay: what the logarithm falls by from token to token.
        document_starts_bl: true where a new document begins; nothing crosses that border.
    """
    document_bl = document_starts_bl.cumsum(-1)
    same_bls = (document_bl.unsqueeze(-1) == document_bl.unsqueeze(-2)).tril()
    position_l = torch.arange(document_bl.shape[1], device=document_bl.device)
    distance_ls = (position_l.unsqueeze(1) - position_l).clamp(min=0)
    return torch.exp(-log_decay * distance_ls).mul(log_decay) * same_bls


def head_features(q_brp: Tensor, state_brmp: Tensor, v_brp: Tensor) -> Tensor:
    """The features (b, r, f, p) whose weights `map_of_features` turns into a head's map.

    Args:
        q_brp: queries.
        state_brmp: decaying means of (k, 1) times the values.
        v_brp: the token's own values, which the skip adds.
    """
    width, half = q_brp.shape[-1], q_brp.shape[-1] // 2
    q_brp1, keys_brpp, constant_br1p = q_brp.unsqueeze(-1), state_brmp[:, :, :width], state_brmp[:, :, width:]
    turned = (
        q_brp1[:, :, :half] * keys_brpp[:, :, half : 2 * half] - q_brp1[:, :, half : 2 * half] * keys_brpp[:, :, :half]
    )
    return torch.cat(
        [q_brp1 * keys_brpp, turned, keys_brpp, q_brp1 * constant_br1p, constant_br1p, v_brp.unsqueeze(2)], dim=2
    )


def map_of_features(weight_f: Tensor, width: int) -> tuple[Tensor, float]:
    """The map (m, m) from (q, 1) to what multiplies the state of (k, 1), and the skip.

    The queries are scaled in every dimension and turned in pairs of dimensions half a head apart, which is what rotary
    embedding does at the distances that a half-life leaves; a fixed part is added, which is a preference for some keys;
    the weight of the constant depends on the query, which is how much a head attends to content.
    """
    half = width // 2
    scale_p, turn_p, fixed_p, strength_p, constant, skip = weight_f.split([width, half, width, width, 1, 1])
    map_mm = weight_f.new_zeros(width + 1, width + 1)
    map_mm[:width, :width] = torch.diag(scale_p)
    first, second = torch.arange(half), torch.arange(half, 2 * half)
    map_mm[second, first] += turn_p
    map_mm[first, second] -= turn_p
    map_mm[:width, width], map_mm[width, :width], map_mm[width, width] = fixed_p, strength_p, constant
    return map_mm, float(skip)


def balanced(c_moment_mm: Tensor, b_moment_mm: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Maps (n, m) of C and B under which C.B is kept, or as well as n dimensions can, and both have equal moments.

    The n dimensions are those of the singular values of C.B over all pairs of tokens (balanced truncation).
    """
    c_root, c_inverse = _roots(c_moment_mm)
    b_root, b_inverse = _roots(b_moment_mm)
    u, singular, vh = torch.linalg.svd(c_root @ b_root)
    root = singular[:size].clamp(min=0).sqrt().unsqueeze(1)
    return root * (u.T[:size] @ c_inverse), root * (vh[:size] @ b_inverse)


def _roots(moment_mm: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a positive semidefinite matrix and its pseudo-inverse."""
    value, vector = torch.linalg.eigh((moment_mm + moment_mm.T) / 2)
    is_there = value > value[-1] * 1e-10
    root = value.clamp(min=0).sqrt()
    inverse = torch.where(is_there, root.reciprocal(), torch.zeros_like(root))
    return vector * root @ vector.T, vector * inverse @ vector.T


def with_constant(x: Tensor) -> Tensor:
    """(..., p) with a 1 behind it."""
    return F.pad(x, (0, 1), value=1.0)


def _bias(bias: Tensor | None, weight_hpd: Tensor) -> Tensor:
    return weight_hpd.new_zeros(weight_hpd.shape[:2]) if bias is None else bias
