"""Export a finished run: write the target's folder, load it again, compare it with the run, and only then keep it."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mohawkify.errors import ExportError, UsageError, did_you_mean
from mohawkify.exporters.card import model_card
from mohawkify.exporters.card_facts import carry_licence
from mohawkify.exporters.compare import compare, require_agreement, require_same_model, sample_ids
from mohawkify.exporters.contents import Quantised, expected_tensors, require_contents
from mohawkify.exporters.llamba import load_llamba, require_llamba, write_llamba
from mohawkify.exporters.mlx import build_mlx, load_mlx, mlx_logits, require_mlx, shapes_of, write_mlx
from mohawkify.files.atomic import atomic_directory
from mohawkify.run.folder import finished_run
from mohawkify.student.graft import precise_parameters
from mohawkify.student.save import load_student, save_student, save_tokenizer, saved_tensors, weight_bytes
from mohawkify.teacher.tokenizer import load_tokenizer
from mohawkify.teacher.validate import require_config

Report = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """The formats of exports.

    Args:
        library: ``transformers``, ``mlx`` or ``llamba``.
        bits: of the quantised weights; None where nothing is quantised.
    """

    library: str
    bits: int | None = None


TARGETS = {
    "hf": Target("transformers"),
    "mlx": Target("mlx"),
    "mlx-q8": Target("mlx", 8),
    "mlx-q4": Target("mlx", 4),
    "llamba": Target("llamba"),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def export_run(run: Path, target: str, output: Path, *, dtype: str | None = None, report: Report) -> dict[str, Any]:
    """Export a finished run.

    Args:
        run: the run's folder.
        target: a key of `TARGETS`.
        output: the folder to write; it must not exist yet, or be empty. It appears whole or not at all.
        dtype: precision of what is neither quantised nor kept in float32: ``bfloat16`` (default) or ``float32``.
        report: receives a line for every step of the way.

    Returns:
        target, directory, bytes, dtype; the fields of `Agreement`; dtypes, by safetensors' name of each how
        many tensors and elements are stored in it; and plain, the modules that a quantised target left plain.

    Raises:
        UsageError: no such target, precision or finished run.
        ExportError: the output folder is in use, the target's library cannot hold the student, its files do not hold
            the tensors they should, or the export does not agree with the run.
        MissingExtraError: the target's library is not installed.
    """
    wanted, dtype = _target(target), dtype or "bfloat16"
    if dtype not in DTYPES:
        raise UsageError(f"found the precision {dtype}, expected one of {', '.join(DTYPES)}")
    source = finished_run(run)
    values: dict[str, Any] | None = None
    if wanted.library == "mlx":
        values = require_config(source.final / "config.json")
        require_mlx(values)
    _require_free(output)

    report(f"loading {source.final}")
    student: Any = load_student(source.checked_final(), config_values=values)
    if wanted.library == "llamba":
        require_llamba(student)
    tokenizer = load_tokenizer(source.final, student.config.vocab_size, student.config.to_dict())
    ids_bl = sample_ids(student)
    quantised: Quantised | None = None
    with atomic_directory(output, needed=_least_bytes(student, DTYPES[dtype], wanted.bits)) as folder:
        report(f"writing {target} in {dtype}")
        if values is not None:
            shapes, quantised = _export_mlx(values, student, ids_bl, folder, dtype, wanted.bits)
            student.generation_config.to_json_file(folder / "generation_config.json")
            save_tokenizer(tokenizer, folder)
        elif wanted.library == "llamba":
            shapes = write_llamba(student, folder, DTYPES[dtype])
            save_tokenizer(tokenizer, folder)
        else:
            save_student(student, tokenizer, folder, DTYPES[dtype])
            shapes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(student).items()}
        precise = () if wanted.library == "llamba" else precise_parameters(student.config.mixer)
        dtypes = require_contents(folder, expected_tensors(shapes, dtype, quantised, precise))
        report("comparing the export with the run")
        is_mlx = wanted.library == "mlx"
        if is_mlx:
            found = mlx_logits(load_mlx(folder))
        elif wanted.library == "llamba":
            found = _torch_logits(load_llamba(folder, target)[0])
        else:
            found = _torch_logits(load_student(folder, DTYPES[dtype]))
        agreement = compare(_torch_logits(student), found, ids_bl)
        require_agreement(agreement, dtype, wanted.bits)
        result: dict[str, Any] = {
            "target": target,
            "directory": str(output),
            "dtype": dtype,
            **asdict(agreement),
            "dtypes": dtypes,
            "plain": quantised.plain if quantised else [],
        }
        carry_licence(source, folder)
        (folder / "README.md").write_text(model_card(source, wanted.library, wanted.bits, result), encoding="utf-8")
        result["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    if is_mlx and glob.has_magic(os.path.abspath(output)):
        report(f"warning: mlx-lm takes {output} for a pattern, because of *, ? or [ in it: move the export to use it")
    return result


def _export_mlx(
    values: Mapping[str, Any], student: Any, ids_bl: Tensor, folder: Path, dtype: str, bits: int | None
) -> tuple[dict[str, tuple[int, ...]], Quantised | None]:
    """Write the model, refused if it is another one even before rounding; returns its shapes and what was quantised."""
    model, config = build_mlx(values, student)
    shapes = shapes_of(model)
    if dtype != "float32" or bits is not None:
        require_same_model(compare(_torch_logits(student), mlx_logits(model), ids_bl))
    return shapes, write_mlx(model, config, folder, dtype, bits)


def _least_bytes(student: Any, dtype: torch.dtype, bits: int | None) -> int:
    """The least size of an export on the disk; of a quantised one, that of its packed elements."""
    return weight_bytes(student, dtype) if bits is None else student.num_parameters() * bits // 8


def _target(name: str) -> Target:
    if name not in TARGETS:
        expected = ", ".join(TARGETS)
        raise UsageError(f"found the target {name}, expected one of {expected}{did_you_mean(name, list(TARGETS))}")
    return TARGETS[name]


def _require_free(output: Path) -> None:
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ExportError(f"{output} is not a folder", hint="choose another --output")
    if output.is_dir() and any(output.iterdir()):
        raise ExportError(f"{output} is not empty", hint="choose another --output, or remove that folder")


def _torch_logits(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda ids_bl: model(ids_bl, use_cache=False).logits
