"""The verdict on a folder: is everything in it as it was written, and would it be refused? No torch here.

What it looks at is what a command would refuse before it uses the folder; nothing in it is run, and nothing written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mohawkify.data.corpus import noted_corpus, verify_corpus
from mohawkify.data.teacher_logits import ABOUT, TeacherLogits
from mohawkify.errors import CheckpointError, MohawkifyError, TeacherError, UsageError
from mohawkify.files.atomic import MANIFEST_NAME, file_sha256, read_json, read_lines, verify_directory
from mohawkify.run.checkpoint import Checkpoint, list_checkpoints, open_checkpoint
from mohawkify.run.folder import RunFolder, changed_files, run_identity
from mohawkify.teacher.tokenizer_files import require_tokenizer_files, text_hashes
from mohawkify.teacher.validate import (
    ClaimedTensor,
    read_header,
    read_tensors,
    require_config,
    require_own_files,
    require_plain_weights,
)

NEVER_READ = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".gguf", ".onnx", ".msgpack", ".h5")
NOTHING = "nothing known"
NUMBERS_AT_ONCE = 1 << 22
BF16_EXPONENT = 0x7F80


def judge(folder: Path) -> dict[str, Any]:
    """Examine a teacher, a run, a checkpoint, a finished student, an export, prepared text or teacher logits.

    Args:
        folder: where it lies.

    Returns:
        A JSON object: ``folder``, ``kind``, ``sound``, and ``findings``: what was examined, whether it is sound, and
        the line that a command would refuse it with.

    Raises:
        UsageError: there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}", hint="name a folder that mohawkify writes or reads")
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
    has_manifest = (folder / MANIFEST_NAME).is_file()
    if re.fullmatch(r"step-[0-9]{8,}", folder.name) and (has_manifest or (folder / "state.json").exists()):
        return "checkpoint"
    if _is_corpus(folder):
        return "prepared text"
    if has_manifest:
        return "student or export"
    if (folder / "config.json").exists():
        return "teacher"
    if (folder / ABOUT).is_dir():
        return "teacher logits"
    return "prepared text" if any(_is_corpus(path) for path in folder.glob("[!.]*")) else NOTHING


def _is_corpus(path: Path) -> bool:
    return (path / MANIFEST_NAME).is_file() and any(path.glob("shard-*"))


def _judge_run(folder: Path) -> list[dict[str, Any]]:
    run = RunFolder(folder)
    findings = [
        _finding("recipe.yaml", run.recipe),
        _finding("metrics.jsonl", lambda: _require_log(folder)),
        _finding("teacher.json", run.teacher_files),
        _finding("the teacher's files are those of the run", lambda: _require_same_teacher(run)),
        _finding("results.json", run.results),
    ]
    for name in ("plan.json", "student.json", "eval.json"):
        if (folder / name).exists():
            findings.append(_finding(name, partial(_require_object, folder / name)))
    findings += _named("corpora", _judge_corpora(run.corpora))
    for checkpoint in list_checkpoints(run.checkpoints):
        findings += _named(f"checkpoints/{checkpoint.name}", _judge_checkpoint(checkpoint, run))
    if run.final.is_dir():
        findings += _named("final", _judge_sealed(run.final))
    return findings


def _judge_checkpoint(folder: Path, run: RunFolder | None = None) -> list[dict[str, Any]]:
    opened: list[Checkpoint] = []

    def numbers() -> None:
        for name in ("model", "optimizer"):
            _require_finite(read_header(folder / f"{name}.safetensors"))

    findings = [
        _finding("every byte as it was written", lambda: opened.append(open_checkpoint(folder))),
        _finding("all numbers finite", numbers),
    ]
    if run is not None and opened:
        findings.append(_finding("recipe and teacher are the run's", lambda: _require_identity(opened[0], run)))
    return findings


def _judge_text(folder: Path) -> list[dict[str, Any]]:
    if _is_corpus(folder):
        return [_finding("every byte as it was written", lambda: verify_corpus(folder))]
    return _judge_corpora(folder)


def _judge_corpora(folder: Path) -> list[dict[str, Any]]:
    """Hash tokenised text, where need be the text elsewhere that a note leads to."""
    paths = sorted(path for path in folder.glob("[!.]*") if path.is_dir() or path.suffix == ".json")
    return [
        _finding(
            path.name,
            partial(noted_corpus, path, verify_corpus) if path.suffix == ".json" else partial(verify_corpus, path),
        )
        for path in paths
    ]


def _judge_logits(folder: Path) -> list[dict[str, Any]]:
    opened: list[TeacherLogits] = []

    def shards(logits: TeacherLogits) -> None:
        for number in sorted(set(range(logits.num_shards)) - set(logits.missing())):
            logits.verify_shard(number)

    findings = [_finding("what they are of", lambda: opened.append(TeacherLogits(folder)))]
    for logits in opened:
        findings += [
            _finding("vocabulary", logits.vocabulary),
            _finding("all shards are there", logits.require_complete),
            _finding("every record as it was written", partial(shards, logits)),
        ]
    return findings + _named("corpora", _judge_corpora(folder / "corpora"))


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
        _finding("weights are plain safetensors", lambda: require_plain_weights(config, require_config(config))),
        _finding("shards, index and headers agree", lambda: read_tensors(folder)),
        _finding("all numbers finite", lambda: _require_finite(read_tensors(folder))),
        _finding("tokenizer", lambda: require_tokenizer_files(folder)),
    ]


def _require_object(path: Path) -> None:
    if not isinstance(read_json(path), dict):
        raise CheckpointError(f"{path} is not a JSON object")


def _require_log(folder: Path) -> None:
    if not read_lines(folder / "metrics.jsonl") and list_checkpoints(folder / "checkpoints"):
        raise CheckpointError(f"{folder / 'metrics.jsonl'} is missing or empty, though steps were taken")


def _require_same_teacher(run: RunFolder) -> None:
    """Compare what a run would be refused for when it continues or is measured."""
    facts = run.teacher()
    teacher = Path(facts["folder"])
    for name, digest in sorted(facts["files"].items()) if teacher.is_dir() else ():
        if Path(name).name == name and file_sha256(teacher / name) != digest:
            raise TeacherError(f"{teacher / name} is not the file that the run was made from")
    text_files = run.text_files()
    changed = changed_files(text_files, text_hashes(teacher)) if text_files is not None and teacher.is_dir() else []
    if changed:
        raise TeacherError(f"{teacher / changed[0]} is not the file that the run was made from")


def _require_identity(checkpoint: Checkpoint, run: RunFolder) -> None:
    if checkpoint.state.get("identity") != run_identity(run.recipe(), run.teacher_files()):
        raise CheckpointError(f"{checkpoint.path.name} belongs to another recipe or teacher")


def _judge_nothing(folder: Path) -> list[dict[str, Any]]:
    says = "no config.json, no recipe.yaml, no manifest and no text: nothing that mohawkify writes or reads"
    return [{"what": "what it is", "sound": False, "says": f"{folder} holds {says}"}]


_KINDS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "run": _judge_run,
    "checkpoint": _judge_checkpoint,
    "student or export": _judge_sealed,
    "prepared text": _judge_text,
    "teacher logits": _judge_logits,
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
