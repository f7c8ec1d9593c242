"""Export a finished run: write the target's folder, load it again, compare it with the run, and only then keep it."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mohawkify.errors import ExportError, UsageError, did_you_mean
from mohawkify.exporters.card import model_card
from mohawkify.exporters.card_facts import carry_licence
from mohawkify.exporters.compare import compare, require_agreement, require_same_model
from mohawkify.exporters.contents import Quantised, expected_tensors, require_contents
from mohawkify.exporters.granite_hybrid import (
    PRECISE,
    build_mamba2,
    load_mamba2,
    mamba2_tensors,
    require_mamba2,
    write_mamba2,
)
from mohawkify.exporters.llamba import load_llamba, require_llamba, write_llamba
from mohawkify.exporters.mlx import build_mlx, load_mlx, mlx_logits, require_mlx, shapes_of, write_mlx
from mohawkify.exporters.texts import comparison_texts
from mohawkify.files.atomic import atomic_directory
from mohawkify.run.folder import finished_run
from mohawkify.student.graft import precise_parameters
from mohawkify.student.save import load_student, save_student, save_tokenizer, saved_tensors, weight_bytes
from mohawkify.teacher.tokenizer import load_tokenizer
from mohawkify.teacher.validate import require_config

Report = Callable[[str], None]
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """The formats of exports.

    Args:
        library: ``transformers``, ``mlx`` or ``llamba``.
        bits: of the quantised weights; None where nothing is quantised.
        is_stock: whether it is a model that the library has, so that no code travels.
    """

    library: str
    bits: int | None = None
    is_stock: bool = False


TARGETS = {
    "hf": Target("transformers"),
    "mlx": Target("mlx"),
    "mlx-q8": Target("mlx", 8),
    "mlx-q4": Target("mlx", 4),
    "llamba": Target("llamba"),
    "mamba2": Target("transformers", is_stock=True),
    "mamba2-mlx-q8": Target("mlx", 8, is_stock=True),
    "mamba2-mlx-q4": Target("mlx", 4, is_stock=True),
}
UNROUNDED_TEXTS = 2  # enough to tell another model from the run's
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class _Written:
    """What a target has written.

    Args:
        shapes: of the tensors in the files, by name.
        precise: patterns of those that stay in float32.
        load: loads the folder, and maps token ids (1, l) to logits (1, l, v).
        quantised: what was quantised; None where the target does not quantise.
    """

    shapes: Mapping[str, tuple[int, ...]]
    precise: Iterable[str]
    load: Callable[[], Logits]
    quantised: Quantised | None = None


def export_run(run: Path, target: str, output: Path, *, dtype: str | None = None, report: Report) -> dict[str, Any]:
    """Export a finished run.

    Args:
        run: the run's folder.
        target: a key of `TARGETS`.
        output: the folder to write; it must not exist yet, or be empty. It appears whole or not at all.
        dtype: precision of what is neither quantised nor kept in float32: ``bfloat16`` (default) or ``float32``.
        report: receives a line for every step of the way.

    Returns:
        target, directory, bytes, dtype; the fields of `Agreement`; text, on which they were found; dtypes, by
        safetensors' name of each how many tensors and elements are stored in it; and plain, the modules that a
        quantised target left plain.

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
    values = require_config(source.final / "config.json")
    if wanted.library == "mlx":
        require_mlx(values, wanted.is_stock)
    _require_free(output)

    report(f"loading {source.final}")
    student: Any = load_student(source.checked_final(), config_values=values)
    if wanted.library == "llamba":
        require_llamba(student)
    if wanted.is_stock:
        require_mamba2(student)
    tokenizer = load_tokenizer(source.final, student.config.vocab_size, student.config.to_dict())
    text, texts = comparison_texts(source, student, tokenizer, report)
    with atomic_directory(output, needed=_least_bytes(student, DTYPES[dtype], wanted.bits)) as folder:
        report(f"writing {target} in {dtype}")
        written = _write(wanted, values, student, texts, folder, dtype)
        save_tokenizer(tokenizer, folder)
        student.generation_config.to_json_file(folder / "generation_config.json")
        dtypes = require_contents(folder, expected_tensors(written.shapes, dtype, written.quantised, written.precise))
        report(f"comparing the export with the run on {sum(map(len, texts)):,} tokens of {text}")
        agreement = compare(_torch_logits(student), written.load(), texts)
        require_agreement(agreement, dtype, wanted.bits)
        result: dict[str, Any] = {
            "target": target,
            "directory": str(output),
            "dtype": dtype,
            **asdict(agreement),
            "text": text,
            "dtypes": dtypes,
            "plain": written.quantised.plain if written.quantised else [],
        }
        carry_licence(source, folder)
        card = model_card(source, wanted.library, wanted.bits, result, wanted.is_stock)
        (folder / "README.md").write_text(card, encoding="utf-8")
        result["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    if wanted.library == "mlx" and glob.has_magic(os.path.abspath(output)):
        report(f"warning: mlx-lm takes {output} for a pattern, because of *, ? or [ in it: move the export to use it")
    return result


def _write(
    wanted: Target, values: Mapping[str, Any], student: Any, texts: Sequence[Tensor], folder: Path, dtype: str
) -> _Written:
    """Write weights, configuration and code of a target; refused if it is another model even before rounding."""
    if wanted.library == "llamba":
        shapes = write_llamba(student, folder, DTYPES[dtype])
        return _Written(shapes, (), lambda: _torch_logits(load_llamba(folder, "llamba")[0]))
    precise: Iterable[str] = PRECISE if wanted.is_stock else precise_parameters(student.config.mixer)
    if wanted.library == "transformers" and not wanted.is_stock:
        save_student(student, None, folder, DTYPES[dtype])
        shapes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(student).items()}
        return _Written(shapes, precise, lambda: _torch_logits(load_student(folder, DTYPES[dtype])))
    stock: Any = build_mamba2(student) if wanted.is_stock else None
    if wanted.library == "mlx":
        from mohawkify.exporters.mlx_granite_hybrid import build_mlx_granite

        model, config = build_mlx(values, student) if stock is None else build_mlx_granite(stock)
        logits, shapes = mlx_logits(model), shapes_of(model)
    else:
        logits = _torch_logits(stock)
        shapes = {name: tuple(tensor.shape) for name, tensor in mamba2_tensors(stock).items()}
    if dtype != "float32" or wanted.bits is not None:
        require_same_model(compare(_torch_logits(student), logits, texts[:UNROUNDED_TEXTS]))
    if wanted.library == "mlx":
        quantised = write_mlx(model, config, folder, dtype, wanted.bits)
        return _Written(shapes, precise, lambda: mlx_logits(load_mlx(folder)), quantised)
    write_mamba2(stock, folder, DTYPES[dtype])
    return _Written(shapes, precise, lambda: _torch_logits(load_mamba2(folder, DTYPES[dtype])))


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


def _torch_logits(model: Any) -> Logits:
    return lambda ids_bl: model(ids_bl, use_cache=False).logits
