"""One step of each stage, as it is trained and as it is defined: the same losses, then time and memory.

The direct formulation materialises all of the method's definitions: the teacher's attention matrices as
transformers returns them, every mixer's matrix, the logits of the whole batch and of both models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mohawkify.bench.markdown import Bound, Measure, Report
from mohawkify.bench.measure import can_measure_memory, peak_in_child, peak_over, side_by_side
from mohawkify.data.packing import Batch
from mohawkify.distributed.device import wait_for
from mohawkify.errors import NumericsError
from mohawkify.families.decoder_layers import find_layers
from mohawkify.mixers.kinds import mixers_of
from mohawkify.objectives.catalogue import make_objective
from mohawkify.objectives.objective import Objective, Runner, TeacherStudent, model_inputs
from mohawkify.objectives.trainable import mixers_by_layer, mixing_modules
from mohawkify.ops.losses import align_loss, distill_loss
from mohawkify.ops.scan import mixing_matrix
from mohawkify.planning.planner import STAGES
from mohawkify.planning.planning import plan
from mohawkify.recipe.loading import apply_overrides, load_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.student.build import build_student, design_student
from mohawkify.teacher.capture import LayerCall, layer_hooks
from mohawkify.teacher.load import load_teacher
from mohawkify.teacher.resolve import resolve_teacher

ROUNDS = 5
OWN, DIRECT = "mohawkify", "direct"
ALLOWED_DIFFERENCE = 1e-4  # of the losses, which are sums over many tokens in float32
SPEED_OVER_DIRECT = 2.0
MATMUL_WIDTH = 1024


@dataclass(frozen=True)
class Workload:
    """A teacher, its fresh student, a batch of random tokens in documents, and a recipe."""

    models: TeacherStudent
    batch: Batch
    recipe: Recipe
    planned: dict[str, Any]
    device: torch.device

    @classmethod
    def make(cls, teacher: str, batch: int, length: int, device: torch.device) -> Workload:
        """Load a teacher and build its student as the demo's recipe has it.

        Args:
            teacher: a folder, a model on the Hub, or ``demo``.
        """
        resolved = resolve_teacher(teacher, need="weights")
        sizes = [
            f"stages.{name}.{key}={value}"
            for name in STAGES
            for key, value in (("sequence_length", length), ("batch_sequences", batch))
        ]
        recipe = apply_overrides(load_recipe("demo"), tuple(sizes))
        spec = design_student("bench", resolved.spec, resolved.config, resolved.adapter, recipe.student)
        loaded = load_teacher(resolved, dtype=torch.float32, device=device)
        student = build_student(loaded, resolved.adapter, spec, recipe.student.start, seed=0)
        generator = torch.Generator().manual_seed(0)
        ids_bl = torch.randint(resolved.spec.vocab_size, (batch, length), generator=generator)
        positions_bl = (torch.arange(length) % max(length // 2, 1)).expand(batch, -1).clone()
        packed = Batch(ids_bl.to(device), positions_bl.to(device), torch.ones_like(ids_bl, dtype=torch.bool).to(device))
        return cls(
            TeacherStudent(loaded, student, spec, resolved.adapter), packed, recipe, plan(teacher, recipe), device
        )

    def stage(self, name: str) -> Objective:
        """A stage as it is trained."""
        return make_objective(self.models, self.recipe.stages.blocks()[name])

    def step(self, name: str, form: str, parts: dict[str, float] | None = None) -> Callable[[], float]:
        """One optimiser step of a stage, which leaves the weights as they are: its learning rate is 0.

        Args:
            form: ``mohawkify`` or ``direct``.
            parts: receives the seconds per part, if given.

        Returns:
            A function that takes the step and returns its loss.
        """
        stage = self.stage(name)
        parameters = list(stage.parameters().values())
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
        seconds = {} if parts is None else parts

        def timed(part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if parts is None:
                return function(*args, **kwargs)
            wait_for(self.device)
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            wait_for(self.device)
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - begin
            return result

        def run() -> float:
            runner = Runner(
                backward=lambda loss: timed("backward", loss.backward),
                call=lambda function, *args, **kwargs: timed("student", function, *args, **kwargs),
            )
            metrics = stage.run(self.batch, runner) if form == OWN else _DIRECT[name](self, runner)
            timed("optimiser", optimizer.step)
            optimizer.zero_grad()
            return float(metrics["loss"])

        for parameter in self.models.student.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return run


def bench_training(
    teacher: str, device: torch.device, *, batch: int, length: int, quick: bool, report: Report
) -> dict[str, Any]:
    """Compare and time a step of each stage.

    Args:
        teacher: a folder, a model on the Hub, or ``demo``.
        quick: one round, and no memory.

    Returns:
        A JSON object: ``rows`` (a stage and form each), ``measures`` and the speed of large products.

    Raises:
        NumericsError: the losses of both forms differ; nothing is timed then.
    """
    report(f"loading {teacher}")
    workload = Workload.make(teacher, batch, length, device)
    losses = {}
    for name in STAGES:
        report(f"{name}: losses")
        losses[name] = {form: workload.step(name, form)() for form in (OWN, DIRECT)}
    require_same(losses)
    product_flops = _product_flops(device)
    rows, measures = [], []
    for name in STAGES:
        report(f"{name}: time and memory")
        timings = side_by_side(
            {form: workload.step(name, form) for form in (OWN, DIRECT)}, 1 if quick else ROUNDS, device
        )
        planned = workload.planned["stages"][name]
        flops = planned["flops"] / planned["tokens"] * batch * length
        for form, timing in timings.items():
            rows.append(
                {
                    "stage": name,
                    "form": form,
                    "loss": losses[name][form],
                    "tokens_per_second": batch * length / timing.median,
                    **timing.to_json(),
                    "peak_bytes": None if quick else _peak(workload, teacher, name, form),
                    "shares": _shares(workload, name, form),
                    "model_flops_utilisation": flops / timing.median / product_flops if form == OWN else None,
                }
            )
        speed = 1 / timings[OWN].over(timings[DIRECT])
        measures.append(Measure(f"{name}: speed over the direct form", speed, Bound.AT_LEAST, SPEED_OVER_DIRECT))
    sizes = {"teacher": teacher, "batch": batch, "length": length, "product_flops_per_second": product_flops}
    return {"rows": rows, "measures": [measure.to_json() for measure in measures], **sizes}


def require_same(losses: dict[str, dict[str, float]]) -> None:
    """Refuse to time two forms that do not compute the same.

    Raises:
        NumericsError: it names the stage and both losses.
    """
    for name, forms in losses.items():
        difference = abs(forms[OWN] - forms[DIRECT])
        if not difference <= ALLOWED_DIFFERENCE * abs(forms[DIRECT]):
            raise NumericsError(
                f"{name}: found a loss of {forms[OWN]:.8g}, {forms[DIRECT]:.8g} by its definition",
                hint="no speed is reported for wrong results; this is a bug of the stage or of the device",
            )


def _shares(workload: Workload, name: str, form: str) -> dict[str, float]:
    """Shares of a step's time; what is left is the teacher and the loss, stage 1's gradients of matrices included."""
    parts: dict[str, float] = {}
    step = workload.step(name, form, parts)
    begin = time.perf_counter()
    step()
    whole = time.perf_counter() - begin
    return {part: spent / whole for part, spent in parts.items()} | {
        "teacher and loss": 1 - sum(parts.values()) / whole
    }


def _peak(workload: Workload, teacher: str, name: str, form: str) -> int | None:
    if workload.device.type == "cuda":
        return peak_over(workload.step(name, form), workload.device)
    if not can_measure_memory():
        return None
    batch, length = workload.batch.input_ids.shape
    return peak_in_child(
        {"kind": "train", "teacher": teacher, "batch": batch, "length": length, "stage": name, "form": form}
    )


def _product_flops(device: torch.device) -> float:
    """The speed of large products of matrices, which no model exceeds."""
    left = torch.randn(MATMUL_WIDTH, MATMUL_WIDTH, device=device)
    timing = side_by_side({"product": lambda: left @ left}, 10, device)["product"]
    return 2.0 * MATMUL_WIDTH**3 / min(timing.seconds)


def _direct_orient(workload: Workload, runner: Runner) -> dict[str, Tensor]:
    models, batch = workload.models, workload.batch
    document_starts_bl = batch.position_ids == 0
    calls: list[LayerCall] = []
    before = models.teacher.config._attn_implementation
    models.teacher.set_attn_implementation("eager")
    try:
        with torch.no_grad(), layer_hooks(mixing_modules(models.teacher, models.spec), calls.append):
            outputs = models.teacher(**model_inputs(models.teacher, batch, models.spec), output_attentions=True)
    finally:
        models.teacher.set_attn_implementation(before)
    mixers = mixers_by_layer(models.student, models.spec)
    losses = []
    for call in calls:
        parts = runner.call(mixers[call.layer].matrix_parts, call.hidden_bld, document_starts_bl)
        matrix_bhls = runner.call(mixing_matrix, *parts, document_starts_bl)
        # Summed in float64, as the loss of the stage is.
        norm_bh = torch.linalg.vector_norm(
            matrix_bhls - outputs.attentions[call.layer].float(), dim=(-2, -1), dtype=torch.float64
        )
        losses.append(norm_bh.mean().to(matrix_bhls.dtype))
    loss = torch.stack(losses).sum()
    runner.backward(loss)
    return {"loss": loss.detach()}


def _direct_align(workload: Workload, runner: Runner) -> dict[str, Tensor]:
    models, batch = workload.models, workload.batch
    students = _align_modules(workload, models.student)
    calls: list[LayerCall] = []
    with torch.no_grad(), layer_hooks(_align_modules(workload, models.teacher), calls.append):
        models.teacher(**model_inputs(models.teacher, batch, models.spec))
    losses = []
    with _mixing_by_matrix(models.student):
        for call in calls:
            output = runner.call(students[call.layer], call.hidden_bld, *call.further, **call.arguments)
            output_bld = output[0] if isinstance(output, tuple) else output
            losses.append(align_loss(output_bld, call.output_bld)[0])
        loss = torch.stack(losses).sum()
        runner.backward(loss)
    return {"loss": loss.detach()}


def _direct_distill(workload: Workload, runner: Runner) -> dict[str, Tensor]:
    models, batch = workload.models, workload.batch
    with torch.no_grad():
        teacher_blv = models.teacher(**model_inputs(models.teacher, batch, models.spec)).logits
    with _mixing_by_matrix(models.student):
        student_blv = runner.call(models.student, **model_inputs(models.student, batch, models.spec)).logits
        loss, _ = distill_loss(student_blv, teacher_blv, batch.loss_mask, workload.recipe.stages.distill.temperature)
        runner.backward(loss)
    return {"loss": loss.detach()}


_DIRECT: dict[str, Callable[[Workload, Runner], dict[str, Tensor]]] = {
    "orient": _direct_orient,
    "align": _direct_align,
    "distill": _direct_distill,
}


def _align_modules(workload: Workload, model: PreTrainedModel) -> dict[int, nn.Module]:
    spec = workload.models.spec
    if workload.recipe.stages.align.target == "mixer":
        return mixing_modules(model, spec)
    layers = find_layers(model, spec.layers)
    return {index: layers[index] for index in spec.mixer_layers}


@contextmanager
def _mixing_by_matrix(student: nn.Module) -> Iterator[None]:
    """Within the block every mixer materialises its matrix and multiplies by it."""

    def by_matrix(
        x_blhp: Tensor,
        b_blhn: Tensor,
        c_blhn: Tensor,
        log_decay_blh: Tensor,
        state: None,
        document_starts_bl: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The outputs, and no state: nothing is continued in training."""
        matrix_bhls = mixing_matrix(b_blhn, c_blhn, log_decay_blh, None, document_starts_bl)
        return torch.einsum("bhls,bshp->blhp", matrix_bhls, x_blhp), x_blhp.new_empty(0)

    mixers: list[Any] = list(mixers_of(student).values())
    scans = [mixer.scan for mixer in mixers]
    for mixer in mixers:
        mixer.scan = by_matrix
    try:
        yield
    finally:
        for mixer, scan in zip(mixers, scans, strict=True):
            mixer.scan = scan
