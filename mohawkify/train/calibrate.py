"""The stage before the others: mixers fitted to the teacher's attention on text, in closed form, layers together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from mohawkify.data.loader import SampleRange, read_batches
from mohawkify.data.packing import Batch
from mohawkify.distributed.process_group import World
from mohawkify.families.projections import read_attention
from mohawkify.mixers.attention_heads import output_projection
from mohawkify.mixers.calibration import MAX_SUMS_BYTES, AttentionCall, Calibration, HeadsBeside
from mohawkify.objectives.objective import TeacherStudent, run_trunk
from mohawkify.objectives.trainable import mixers_by_layer, mixing_modules
from mohawkify.recipe.schema import CalibrateRecipe
from mohawkify.student.build import float_on
from mohawkify.teacher.capture import LayerCall, capture_attention, layer_hooks
from mohawkify.train.conversion import Conversion


def calibrations_of(models: TeacherStudent) -> dict[int, Calibration]:
    """The calibration of every mixer; made while the teacher's weights are whole, for it may be spread later."""
    spec, adapter = models.spec, models.adapter
    attentions, students = (mixing_modules(model, spec) for model in (models.teacher, models.student))
    calibrations = {}
    for index, mixer in mixers_by_layer(models.student, spec).items():
        weights = float_on(next(mixer.parameters()).device, read_attention(adapter, attentions[index]))
        layer, beside = spec.layer_specs[index], None
        if layer.heads:
            beside = HeadsBeside(weights.of_heads(layer.heads), output_projection(students[index].attention))
        calibrations[index] = mixer.calibration(mixer, weights.of_heads(layer.replaced_heads), beside)
    return calibrations


def calibrate(
    models: TeacherStudent,
    calibrations: Mapping[int, Calibration],
    text: CalibrationText,
    world: World,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> float:
    """Fit all mixers; every process reads its rows of every batch, and all set the same values.

    The first passes read a part of the text. Sums over tokens are all that is kept, so memory does not grow with text.

    Args:
        models: teacher and student, which has its start values.
        calibrations: of its mixers, by layer.
        text: the text.
        world: the processes.
        on_batch: receives the tokens of every batch that was read.

    Returns:
        The distance of the mixers' outputs from those of attention over the latter's norm, a mean over layers.
    """
    relative: list[float] = []
    for name, num_batches in batches_of_passes(calibrations, text.num_batches).items():
        for layers in _groups(calibrations, name, text.sequence_length):
            with closing(text.read(num_batches)) as batches:
                for batch in batches:
                    _add(models, layers, batch)
                    on_batch(batch.input_ids.numel() * world.size)
            for calibration in layers.values():
                for key, tensor in calibration.sums.items():
                    calibration.sums[key] = world.add(tensor)
                error = calibration.solve()
                relative += [] if error is None else [error]
    return sum(relative) / len(relative)


def batches_of_passes(calibrations: Mapping[int, Calibration], num_batches: int) -> dict[str, int]:
    """How many batches every pass reads; layers that are fitted in several groups read them several times."""
    passes = next(iter(calibrations.values())).passes
    return {name: max(1, round(share * num_batches)) for name, share in passes.items()}


@dataclass(frozen=True)
class CalibrationText:
    """The text of a calibration.

    Args:
        num_batches: batches of all the text.
        sequence_length: tokens per sequence.
        read: gives this process's rows of so many batches, on its device.
    """

    num_batches: int
    sequence_length: int
    read: Callable[[int], Generator[Batch]]


def calibration_text(conversion: Conversion, block: CalibrateRecipe, sample_range: SampleRange) -> CalibrationText:
    """The text that a conversion is calibrated on."""
    rows, rank = block.batch_sequences // conversion.world.size, conversion.world.rank

    def read(num_batches: int) -> Generator[Batch]:
        batches = read_batches(
            [sample_range],
            batch_sequences=block.batch_sequences,
            seed=conversion.recipe.seed,
            first_step=0,
            num_workers=conversion.recipe.compute.data_workers,
        )
        with closing(batches):
            for batch in islice(batches, num_batches):
                yield Batch(*(tensor[rank * rows : (rank + 1) * rows].to(conversion.device) for tensor in batch))

    return CalibrationText(block.num_steps, block.sequence_length, read)


def _groups(calibrations: Mapping[int, Calibration], name: str, length: int) -> Iterator[dict[int, Calibration]]:
    """Layers whose sums fit into memory together, each having begun the pass."""
    group: dict[int, Calibration] = {}
    num_bytes = 0
    for index, calibration in calibrations.items():
        calibration.begin(name, length)
        group[index] = calibration
        own = sum(tensor.nbytes for tensor in calibration.sums.values())
        num_bytes += own
        if num_bytes + own > MAX_SUMS_BYTES:
            yield group
            group, num_bytes = {}, 0
    if group:
        yield group


def _add(models: TeacherStudent, layers: Mapping[int, Calibration], batch: Batch) -> None:
    """Run the teacher over a batch, and add what some layers' attention did."""
    attentions: dict[int, nn.Module] = mixing_modules(models.teacher, models.spec)
    mixers = mixers_by_layer(models.student, models.spec)
    document_starts_bl = batch.position_ids == 0

    def on_attention(call: LayerCall) -> None:
        assert call.attention is not None
        hidden_bld, mixer, spec = call.hidden_bld.float(), mixers[call.layer], models.spec.layer_specs[call.layer]
        layers[call.layer].add(
            AttentionCall(
                hidden_bld,
                call.attention.of_heads(spec.replaced_heads).probabilities(),
                call.output_bld.float(),
                document_starts_bl,
                lambda: mixer(hidden_bld, *call.further, **call.arguments),
                call.attention.of_heads(spec.heads).probabilities() if spec.heads else None,
            )
        )

    capturing = capture_attention(models.teacher, models.adapter)
    hooked = layer_hooks({index: attentions[index] for index in layers}, on_attention)
    with torch.no_grad(), capturing, hooked:
        run_trunk(models.teacher, batch, models.spec)
