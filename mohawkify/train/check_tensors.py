"""Whether a checkpoint's tensors fit the student: a whole checkpoint can still be another's, or made up."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mohawkify.errors import CheckpointError
from mohawkify.run.checkpoint import StoredTensors

_COUNTER, _MOMENTS = "step", ("exp_avg", "exp_avg_sq")  # AdamW's, of every parameter that has learned


def require_fitting(path: Path, student: nn.Module, model: StoredTensors, optimizer: StoredTensors) -> None:
    """Refuse tensors that the student or its optimiser could not take; none is read.

    Args:
        path: the checkpoint, for messages.
        student: whole, in no engine yet.
        model: its parameters.
        optimizer: what AdamW keeps of the trained ones, as ``kind/name``.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape or type.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
    if shapes.keys() != model.keys():
        raise CheckpointError(f"the tensors in {path} are not those of this student")
    learned = {key.partition("/")[2] for key in optimizer}
    wanted = {f"{kind}/{name}": shapes.get(name, ()) for name in learned for kind in _MOMENTS}
    wanted |= {f"{_COUNTER}/{name}": () for name in learned}
    if wanted.keys() != optimizer.keys():
        odd = min(wanted.keys() ^ optimizer.keys())
        raise CheckpointError(f"the optimiser state in {path} {'lacks' if odd in wanted else 'has an odd'} {odd}")
    for tensors, expected in ((model, shapes), (optimizer, wanted)):
        for name, shape in expected.items():
            found, kind = tensors.shape(name), tensors.kind(name)
            if found != shape or kind != "F32":
                raise CheckpointError(f"{name} in {path} has the shape {found} of {kind}, expected {shape} of F32")
