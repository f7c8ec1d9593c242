"""Check a folder: is everything in it as it was written, and would a command refuse it?

Nothing in the folder is run, and nothing is written; a GGUF file alone is read into the cache, as everywhere. Torch is
loaded for a teacher alone.
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
from mohawkify.files.safetensors_headers import FLOAT_BYTES, TensorHeader, read_header, read_numbers, read_tensors
from mohawkify.run.checkpoint import Checkpoint, list_checkpoints, open_checkpoint
from mohawkify.run.folder import RunFolder, changed_files, run_identity
from mohawkify.teacher.locate import gguf_file
from mohawkify.teacher.tokenizer_files import text_hashes

NEVER_READ = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".gguf", ".onnx", ".msgpack", ".h5")
UNKNOWN = "unknown"
WEIGHTS_FINITE = "all weights finite"
_BYTES_UNCHANGED = "every byte as it was written"

Check = dict[str, Any]


def check_folder(folder: Path) -> dict[str, Any]:
    """Check a teacher, a run, a checkpoint, a finished student, an export, prepared text, logits or a GGUF file.

    Returns:
        A JSON object: ``folder``, ``kind``, ``valid``, ``never_read`` (names of files that no command reads) and
        ``checks``, each with its ``name``, whether it ``passed``, and the ``error`` that a command would end with.

    Raises:
        UsageError: there is no such folder.
    """
    if not folder.is_dir() and gguf_file(str(folder)) is None:
        raise UsageError(f"no such folder: {folder}", hint="name a folder that mohawkify writes or reads")
    kind = _kind(folder)
    checks = _KINDS[kind](folder)
    return {
        "folder": str(folder),
        "kind": kind,
        "valid": all(check["passed"] for check in checks),
        "checks": checks,
        "never_read": sorted(file.name for file in folder.glob("*") if file.suffix in NEVER_READ),
    }


def _kind(folder: Path) -> str:
    if folder.is_file():
        return "teacher in a GGUF file"
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
    return "prepared text" if any(_is_corpus(path) for path in folder.glob("[!.]*")) else UNKNOWN


def _is_corpus(path: Path) -> bool:
    return (path / MANIFEST_NAME).is_file() and any(path.glob("shard-*"))


def _check_run(folder: Path) -> list[Check]:
    run = RunFolder(folder)
    checks = [
        _check("recipe.yaml", run.recipe),
        _check("metrics.jsonl", lambda: _require_log(folder)),
        _check("teacher.json", run.teacher_files),
        _check("the teacher's files are those of the run", lambda: _require_same_teacher(run)),
        _check("results.json", run.results),
        _check("text.json", run.text),
    ]
    for name in ("plan.json", "student.json", "eval.json"):
        if (folder / name).exists():
            checks.append(_check(name, partial(_require_object, folder / name)))
    checks += _inside("corpora", _check_corpora(run.corpora))
    for checkpoint in list_checkpoints(run.checkpoints):
        checks += _inside(f"checkpoints/{checkpoint.name}", _check_checkpoint(checkpoint, run))
    if run.final.is_dir():
        checks += _inside("final", _check_export(run.final))
    return checks


def _check_checkpoint(folder: Path, run: RunFolder | None = None) -> list[Check]:
    opened: list[Checkpoint] = []

    def require_finite() -> None:
        for name in ("model", "optimizer"):
            _require_finite(read_header(folder / f"{name}.safetensors"))

    checks = [
        _check(_BYTES_UNCHANGED, lambda: opened.append(open_checkpoint(folder))),
        _check(WEIGHTS_FINITE, require_finite),
    ]
    if run is not None and opened:
        checks.append(_check("recipe and teacher are the run's", lambda: _require_identity(opened[0], run)))
    return checks


def _check_text(folder: Path) -> list[Check]:
    if _is_corpus(folder):
        return [_check(_BYTES_UNCHANGED, lambda: verify_corpus(folder))]
    return _check_corpora(folder)


def _check_corpora(folder: Path) -> list[Check]:
    """Hash tokenised text; a note leads to text in another folder, which is hashed there."""
    return [
        _check(
            path.name,
            partial(noted_corpus, path, verify_corpus) if path.suffix == ".json" else partial(verify_corpus, path),
        )
        for path in sorted(folder.glob("[!.]*"))
        if path.is_dir() or path.suffix == ".json"
    ]


def _check_logits(folder: Path) -> list[Check]:
    opened: list[TeacherLogits] = []

    def verify_shards(logits: TeacherLogits) -> None:
        for number in sorted(set(range(logits.num_shards)) - set(logits.missing())):
            logits.verify_shard(number)

    checks = [_check("description", lambda: opened.append(TeacherLogits(folder)))]
    for logits in opened:
        checks += [
            _check("vocabulary", logits.vocabulary),
            _check("all shards are there", logits.require_complete),
            _check("every record as it was written", partial(verify_shards, logits)),
        ]
    return checks + _inside("corpora", _check_corpora(folder / "corpora"))


def _check_export(folder: Path) -> list[Check]:
    return [
        _check(_BYTES_UNCHANGED, lambda: verify_directory(folder)),
        _check(WEIGHTS_FINITE, lambda: _require_finite(read_tensors(folder))),
    ]


def _check_teacher(folder: Path) -> list[Check]:
    """The checks of a conversion; those of the values read the weights in parts, where the family has a file."""
    from mohawkify.student.verify import require_true_family
    from mohawkify.teacher.resolve import ResolvedTeacher, resolve_teacher
    from mohawkify.teacher.soundness import CHECKS

    resolved: list[ResolvedTeacher] = []
    first = "header, metadata and tensors" if folder.is_file() else "config.json"
    checks = [
        _check(
            first,
            lambda: resolved.append(resolve_teacher(str(folder))),
        )
    ]
    for teacher in resolved:
        checks += [_check(name, partial(function, teacher)) for name, function in CHECKS.items()]
        checks.append(_check(WEIGHTS_FINITE, lambda: _require_finite(teacher.tensors)))  # noqa: B023
        if teacher.adapter.autodetected and all(check["passed"] for check in checks):
            checks.append(_check("the family is what its modules say", partial(require_true_family, teacher)))
    return checks


def _check_unknown(folder: Path) -> list[Check]:
    missing = "no config.json, no recipe.yaml, no manifest and no text: nothing that mohawkify writes or reads"
    return [{"name": "kind", "passed": False, "error": f"{folder} holds {missing}"}]


_KINDS: dict[str, Callable[[Path], list[Check]]] = {
    "run": _check_run,
    "checkpoint": _check_checkpoint,
    "student or export": _check_export,
    "prepared text": _check_text,
    "teacher logits": _check_logits,
    "teacher": _check_teacher,
    "teacher in a GGUF file": _check_teacher,
    UNKNOWN: _check_unknown,
}


def _check(name: str, function: Callable[[], object]) -> Check:
    error = ""
    try:
        function()
    except MohawkifyError as refusal:
        error = refusal.message
    except OSError as refusal:
        error = f"cannot read {refusal.filename}: {refusal.strerror}"
    return {"name": name, "passed": not error, "error": error}


def _inside(prefix: str, checks: list[Check]) -> list[Check]:
    return [{**check, "name": f"{prefix}: {check['name']}"} for check in checks]


def _require_object(path: Path) -> None:
    if not isinstance(read_json(path), dict):
        raise CheckpointError(f"{path} is not a JSON object")


def _require_log(folder: Path) -> None:
    if not read_lines(folder / "metrics.jsonl") and list_checkpoints(folder / "checkpoints"):
        raise CheckpointError(f"{folder / 'metrics.jsonl'} is missing or empty, though steps were taken")


def _require_same_teacher(run: RunFolder) -> None:
    """Refuse what a run refuses when it continues or is measured."""
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


def _require_finite(tensors: dict[str, TensorHeader]) -> None:
    """Refuse a floating-point tensor with a value that is not finite in float32, which a model computes in at most."""
    for name, tensor in tensors.items():
        for part in read_numbers(tensor) if tensor.dtype in FLOAT_BYTES else ():
            with np.errstate(over="ignore"):
                is_finite = np.isfinite(part.astype("<f4", copy=False)).all()
            if not is_finite:
                raise TeacherError(f"{name} in {tensor.file.name} holds a value that is not finite")
