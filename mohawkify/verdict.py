"""The verdict on a folder: is everything in it as it was written, and would it be refused? No torch here.

What it looks at is what a command would refuse before it uses the folder; nothing in it is run, and nothing written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mohawkify.checkpoint import list_checkpoints
from mohawkify.data.corpus import read_note
from mohawkify.errors import CheckpointError, MohawkifyError, TeacherError, UsageError
from mohawkify.recipe import load_recipe
from mohawkify.run import RunFolder, run_identity
from mohawkify.storage import MANIFEST_NAME, file_sha256, read_json, read_lines, verify_directory
from mohawkify.teacher.claims import (
    ClaimedTensor,
    read_header,
    read_tensors,
    require_config,
    require_own_files,
    require_plain_weights,
)
from mohawkify.teacher.tokenizer_files import require_tokenizer_files

NEVER_READ = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".gguf", ".onnx", ".msgpack", ".h5")
NOTHING = "nothing known"
NUMBERS_AT_ONCE = 1 << 22
BF16_EXPONENT = 0x7F80


def judge(folder: Path) -> dict[str, Any]:
    """Examine a teacher, a run, a checkpoint, a finished student or an export.

    Args:
        folder: where it lies.

    Returns:
        A JSON object: ``folder``, ``kind``, ``sound``, and ``findings``: what was examined, whether it is sound, and
        the line that a command would refuse it with.

    Raises:
        UsageError: there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}", hint="a teacher, a run, a checkpoint or an export is a folder")
    kind = _kind(folder)
    findings = _KINDS[kind](folder)
    return {
        "folder": str(folder),
        "kind": kind,
        "sound": all(finding["sound"] for finding in findings),
        "findings": findings,
        "never_read": sorted(file.name for file in folder.iterdir() if file.suffix in NEVER_READ),
    }


def _kind(folder: Path) -> str:
    if (folder / "recipe.yaml").is_file():
        return "run"
    if re.fullmatch(r"step-\d{8,}", folder.name) and (folder / "state.json").exists():
        return "checkpoint"
    if (folder / MANIFEST_NAME).is_file():
        return "student or export"
    return "teacher" if (folder / "config.json").exists() else NOTHING


def _judge_run(folder: Path) -> list[dict[str, Any]]:
    findings = [
        _finding("recipe.yaml", lambda: load_recipe(folder / "recipe.yaml")),
        _finding("metrics.jsonl", lambda: _require_log(folder)),
        _finding("recipe and teacher are those of the checkpoints", lambda: _require_identity(folder)),
    ]
    for name in ("plan.json", "teacher.json", "student.json", "results.json", "eval.json"):
        if (folder / name).exists():
            findings.append(_finding(name, lambda name=name: read_json(folder / name)))  # type: ignore[misc]
    corpora = folder / "corpora"
    for corpus in sorted(corpora.glob("[!.]*")) if corpora.is_dir() else []:
        findings.append(_finding(f"corpora/{corpus.name}", lambda path=corpus: _require_corpus(path)))  # type: ignore[misc]
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        findings += _named(f"checkpoints/{checkpoint.name}", _judge_checkpoint(checkpoint))
    if (folder / "final").is_dir():
        findings += _named("final", _judge_sealed(folder / "final"))
    return findings


def _require_corpus(path: Path) -> None:
    """Hash tokenised text, where need be the text elsewhere that a note leads to."""
    verify_directory(read_note(path)[0] if path.suffix == ".json" else path)


def _judge_checkpoint(folder: Path) -> list[dict[str, Any]]:
    def numbers() -> None:
        for name in ("model", "optimizer"):
            _require_finite(read_header(folder / f"{name}.safetensors"))

    return [
        _finding("every byte as it was written", lambda: verify_directory(folder)),
        _finding("state.json", lambda: read_json(folder / "state.json")),
        _finding("all numbers finite", numbers),
    ]


def _judge_sealed(folder: Path) -> list[dict[str, Any]]:
    return [
        _finding("every byte as it was written", lambda: verify_directory(folder)),
        _finding("all numbers finite", lambda: _require_finite(read_tensors(folder))),
    ]


def _judge_teacher(folder: Path) -> list[dict[str, Any]]:
    config = folder / "config.json"
    return [
        _finding("config.json", lambda: require_config(config)),
        _finding("files lie inside the folder", lambda: require_own_files(folder)),
        _finding("weights are plain safetensors", lambda: require_plain_weights(config, read_json(config))),
        _finding("shards, index and headers agree", lambda: read_tensors(folder)),
        _finding("all numbers finite", lambda: _require_finite(read_tensors(folder))),
        _finding("tokenizer", lambda: require_tokenizer_files(folder)),
    ]


def _require_log(folder: Path) -> None:
    if not read_lines(folder / "metrics.jsonl") and list_checkpoints(folder / "checkpoints"):
        raise CheckpointError(f"{folder / 'metrics.jsonl'} is missing or empty, though steps were taken")


def _require_identity(folder: Path) -> None:
    """Compare with the checkpoints what a run would be refused for when it continues or is measured."""
    facts = RunFolder(folder).teacher()
    teacher = Path(facts["folder"])
    for name, digest in sorted(facts["files"].items()) if teacher.is_dir() else ():
        if Path(name).name == name and file_sha256(teacher / name) != digest:
            raise TeacherError(f"{teacher / name} is not the file that the run was made from")
    identity = run_identity(RunFolder(folder).recipe(), RunFolder(folder).teacher_files())
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        if read_json(checkpoint / "state.json").get("identity") != identity:
            raise CheckpointError(f"{checkpoint.name} belongs to another recipe or teacher")


def _judge_nothing(folder: Path) -> list[dict[str, Any]]:
    says = "no config.json, no recipe.yaml and no manifest: nothing that mohawkify writes or reads"
    return [{"what": "what it is", "sound": False, "says": f"{folder} holds {says}"}]


_KINDS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "run": _judge_run,
    "checkpoint": _judge_checkpoint,
    "student or export": _judge_sealed,
    "teacher": _judge_teacher,
    NOTHING: _judge_nothing,
}


def _finding(what: str, check: Callable[[], object]) -> dict[str, Any]:
    try:
        check()
    except MohawkifyError as error:
        return {"what": what, "sound": False, "says": error.message}
    except OSError as error:
        return {"what": what, "sound": False, "says": f"cannot read {error.filename}: {error.strerror}"}
    return {"what": what, "sound": True, "says": ""}


def _named(prefix: str, findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**finding, "what": f"{prefix}: {finding['what']}"} for finding in findings]


def _require_finite(tensors: dict[str, ClaimedTensor]) -> None:
    for name, tensor in tensors.items():
        if not all(_are_finite(part, tensor.dtype) for part in _numbers(tensor)):
            raise TeacherError(f"{name} in {tensor.file.name} holds a value that is not finite")


_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def _numbers(tensor: ClaimedTensor) -> Any:
    """The numbers of a floating-point tensor, a part at a time."""
    if tensor.dtype not in _NUMPY:
        return
    numbers = np.memmap(tensor.file, dtype=np.uint8, mode="r")[tensor.begin : tensor.end]
    width = np.dtype(_NUMPY[tensor.dtype]).itemsize
    for begin in range(0, len(numbers), NUMBERS_AT_ONCE * width):
        yield numbers[begin : begin + NUMBERS_AT_ONCE * width].copy().view(_NUMPY[tensor.dtype])


def _are_finite(numbers: Any, dtype: str) -> bool:
    if dtype == "BF16":  # numpy has no such type: all bits of the exponent set is infinity or not a number
        return not ((numbers & BF16_EXPONENT) == BF16_EXPONENT).any()
    return bool(np.isfinite(numbers).all())
