"""Any hybrid of one calibrated student: its output projections in closed form, put in and out in memory.

Shapes: b batch, l length, h heads, p width of a head, d model width, f features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mohawkify.data.packing import Batch
from mohawkify.data.validation import EvaluationBatch
from mohawkify.errors import RecipeError
from mohawkify.families.adapter import AttentionWeights
from mohawkify.families.decoder_layers import find_layers
from mohawkify.families.projections import read_attention
from mohawkify.mixers.attention_heads import MixerBesideAttention
from mohawkify.mixers.calibration import AttentionCall, ridge
from mohawkify.mixers.start_calibrated import RIDGE_OUTPUT, CalibratedStart, repeated, values, with_constant
from mohawkify.objectives.objective import TeacherStudent, model_inputs
from mohawkify.objectives.trainable import mixing_modules
from mohawkify.ops.chunked_kl import LMHeadInput, chunked_distill_loss
from mohawkify.student.build import float_on
from mohawkify.teacher.lm_head import run_to_lm_head

Kept = Mapping[int, tuple[int, ...]]  # the kept heads by layer


class HeadFit(CalibratedStart):
    """The output projection of one layer for any kept heads: the fit of `CalibratedStart`, with all heads in its sums.

    Everything else of a mixer is fitted head by head, so that this is all that kept heads change.
    """

    passes: ClassVar[Mapping[str, float]] = {"output": 1.0}

    def begin(self, name: str, length: int) -> None:
        """See `Calibration.begin`."""
        inner, hidden = 2 * self.mixer.out_proj.in_features + 1, self.mixer.hidden_size
        self.sums = {"gram": torch.zeros(inner, inner).double(), "target": torch.zeros(inner, hidden).double()}

    @torch.no_grad()
    def add(self, call: AttentionCall) -> None:
        """See `Calibration.add`; the features are those of the mixer, then those of attention."""
        v_bgsp = values(self.weights, call.hidden_bld)
        attended_bhlp = call.probabilities_bhls @ repeated(v_bgsp, call.probabilities_bhls.shape[1])
        parts = [self._gated_features(call), attended_bhlp.transpose(1, 2).flatten(2)]
        features_xf = with_constant(torch.cat(parts, dim=-1)).flatten(0, 1)
        self.sums["gram"] += (features_xf.T @ features_xf).cpu()
        self.sums["target"] += (features_xf.T @ call.output_bld.flatten(0, 1)).cpu()

    def solve(self) -> float | None:
        """See `Calibration.solve`; what is kept is asked for by `projections`."""
        self.gram, self.target = self.sums["gram"], self.sums["target"]
        return 0.0

    def projections(self, kept: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Both parts of the output projection (d, h * p), 0 at the heads of the other one, and its bias (d,)."""
        out_dhp, width = self.weights.out_dhp.double().cpu(), self.mixer.config.head_dim
        num_heads, inner = out_dhp.shape[1], out_dhp.shape[1] * width
        of_mixer = torch.tensor([head not in kept for head in range(num_heads)]).repeat_interleave(width)
        chosen = torch.cat([of_mixer, ~of_mixer]).nonzero().squeeze(1)
        bias_d = out_dhp.new_zeros(len(out_dhp)) if self.weights.out_bias_d is None else self.weights.out_bias_d
        start_fd = out_dhp.flatten(1).T
        solution_fd = torch.zeros(2 * inner + 1, len(out_dhp), dtype=torch.float64)
        solution_fd[chosen] = torch.cat([start_fd, start_fd])[chosen]
        solution_fd[-1] = bias_d.double().cpu()
        if len(kept) < num_heads:
            if self.weights.out_bias_d is not None:
                chosen = torch.cat([chosen, torch.tensor([2 * inner])])
            gram, rest = self.gram[chosen][:, chosen], (self.target - self.gram @ solution_fd)[chosen]
            mean = gram.diagonal()[: int(of_mixer.sum())].mean()
            solution_fd[chosen] += ridge(gram, rest, RIDGE_OUTPUT * float(mean))
        mixer_fd, attention_fd, bias_1d = solution_fd.float().split([inner, inner, 1])
        return mixer_fd.T, attention_fd.T, bias_1d[0]


class Hybrids:
    """A calibrated student whose layers can be given heads of attention, and how far it then is from its teacher.

    Args:
        models: the teacher, and the calibrated student, every layer of which has a mixer.
        fits: of every layer, solved.
        batches: held-out text.
    """

    def __init__(self, models: TeacherStudent, fits: Mapping[int, HeadFit], batches: Sequence[EvaluationBatch]) -> None:
        self.models, self.fits = models, fits
        self.kept: dict[int, tuple[int, ...]] = {}
        spec, layers = models.spec, find_layers(models.student, models.spec.layers)
        models.student.requires_grad_(False)
        for index, attention in mixing_modules(models.teacher, spec).items():
            copied = copy.deepcopy(attention).float().requires_grad_(False)
            getattr(copied, models.adapter.out_proj).bias = None
            setattr(layers[index], spec.attention, MixerBesideAttention(fits[index].mixer, copied))
            self._put(index, ())
        self._batches = [self._answered(batch) for batch in batches]

    def kl(self, kept: Kept) -> float:
        """KL(teacher || student) with these heads, in nats per token."""
        self._keep(kept)
        with torch.no_grad():
            return sum(float(kl) * share for _, kl, share in self._compare())

    def savings(self, kept: Kept, wanted: Sequence[tuple[int, tuple[int, ...]]]) -> list[float]:
        """The KL that some layers' heads would save beyond the kept ones, to first order, by one backward pass.

        Args:
            kept: the heads that are kept.
            wanted: layers, each with all heads that it is to keep instead.
        """
        self._keep(kept)
        weights = {index: self._projections(index) for index in self.fits}
        for pair in weights.values():
            for weight in pair:
                weight.requires_grad_(True).grad = None
        for loss, _, share in self._compare():
            (loss * share).backward()
        found = []
        for layer, heads in wanted:
            saved = 0.0
            for weight, new in zip(weights[layer], self.fits[layer].projections(heads)[:2], strict=True):
                if weight.grad is not None:
                    saved -= float((weight.grad * (new.to(weight) - weight.detach())).sum())
            found.append(saved)
        for pair in weights.values():
            for weight in pair:
                weight.requires_grad_(False).grad = None
        return found

    def _answered(self, batch: EvaluationBatch) -> tuple[Batch, LMHeadInput]:
        """A batch of held-out text, and the teacher's answers to it."""
        models = self.models
        ids_bl, valid_bl = batch.input_ids.to(models.student.device), batch.valid.to(models.student.device)
        positions_bl = torch.arange(ids_bl.shape[1], device=ids_bl.device).expand_as(ids_bl)
        one = Batch(ids_bl, positions_bl, nn.functional.pad(valid_bl[:, 1:], (0, 1)))
        with torch.no_grad():
            return one, run_to_lm_head(models.teacher, models.adapter, **model_inputs(models.teacher, one, models.spec))

    def _compare(self) -> Any:
        """The loss, KL and share of every batch."""
        models, total = self.models, sum(int(batch.loss_mask.sum()) for batch, _ in self._batches)
        for batch, teacher in self._batches:
            student = run_to_lm_head(models.student, models.adapter, **model_inputs(models.student, batch, models.spec))
            loss, kl = chunked_distill_loss(student, teacher, batch.loss_mask, 1.0)
            yield loss, kl, int(batch.loss_mask.sum()) / total

    def _keep(self, kept: Kept) -> None:
        for index in self.fits:
            if self.kept.get(index, ()) != kept.get(index, ()):
                self._put(index, kept.get(index, ()))
        self.kept = dict(kept)

    def _projections(self, index: int) -> tuple[nn.Parameter, nn.Parameter]:
        both = mixing_modules(self.models.student, self.models.spec)[index]
        return both.mixer.out_proj.weight, getattr(both.attention, self.models.adapter.out_proj).weight

    @torch.no_grad()
    def _put(self, index: int, heads: tuple[int, ...]) -> None:
        *new, bias_d = self.fits[index].projections(heads)
        for weight, to in zip(self._projections(index), new, strict=True):
            weight.copy_(to)
        bias = self.fits[index].mixer.out_proj.bias
        if bias is not None:
            bias.copy_(bias_d)


def fits_of(models: TeacherStudent) -> dict[int, HeadFit]:
    """A fit for every layer; raises RecipeError for families whose output projection has another form."""
    fits: dict[int, HeadFit] = {}
    mixers = mixing_modules(models.student, models.spec)
    for index, attention in mixing_modules(models.teacher, models.spec).items():
        if not isinstance(getattr(attention, models.adapter.out_proj, None), nn.Linear):
            raise RecipeError(
                f"found {models.adapter.title}, whose attention has no linear layer {models.adapter.out_proj}, which"
                " scores need",
                hint="student.keep: {layers: [...]} keeps layers of your choice",
            )
        weights: AttentionWeights = read_attention(models.adapter, attention)
        fits[index] = HeadFit(mixers[index], float_on(mixers[index].out_proj.weight.device, weights))
    return fits
