"""A run from a Llamba checkpoint: measured, exported, served and talked with as one that was made here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from mohawkify.errors import TeacherError, UsageError
from mohawkify.exporters.llamba import load_llamba
from mohawkify.files.atomic import atomic_directory, write_json, write_text
from mohawkify.recipe.loading import apply_overrides, dump_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.run.folder import RUNS, RunFolder
from mohawkify.student.save import save_student, weight_bytes
from mohawkify.teacher.locate import locate, teacher_name
from mohawkify.teacher.resolve import ResolvedTeacher, resolve_teacher
from mohawkify.teacher.tokenizer import load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
Report = Callable[[str], None]


@dataclass(frozen=True)
class ImportOptions:
    """Where a checkpoint's run goes, and what belongs to it.

    Args:
        recipe: what the run records; its keys under ``student`` are set from the checkpoint.
        output: a new folder; None for one below runs/.
        teacher: the model that the checkpoint was made from: its tokenizer where the checkpoint has none, and what
            `mohawkify eval` compares with.
    """

    recipe: Recipe
    output: Path | None = None
    teacher: str | None = None


def import_llamba(source: str, options: ImportOptions, report: Report) -> RunFolder:
    """Make a run of a Llamba checkpoint.

    Args:
        source: a folder or a Hub id.
        options: see `ImportOptions`.
        report: receives a line for every step of the way.

    Raises:
        TeacherError: it is no Llamba checkpoint, damaged, or without a tokenizer.
        StorageError: the run's folder is in use.
    """
    config_file, folder = locate(source, "weights")
    if folder is None:
        raise UsageError(f"{config_file} is a configuration, expected the folder of a checkpoint")
    name = teacher_name(source)
    run = RunFolder(options.output or RUNS / name)
    if run.path.is_symlink() or (run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir()))):
        raise UsageError(f"{run.path} is not empty", hint="choose another --output, or remove that folder")
    teacher = None if options.teacher is None else resolve_teacher(options.teacher, need="weights")
    report(f"loading {folder}")
    student, spec = load_llamba(folder, name)
    model: Any = student
    tokenizer = _tokenizer(folder, teacher, model.config)
    ends = tokenizer.eos_token_id if teacher is None else teacher.config.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends)
    sizes = {key: spec.mixer[key] for key in ("state_size", "conv_kernel", "decay_bias", "conv_activation")}
    overrides = [f"student.{key}={str(value).lower()}" for key, value in sizes.items()]
    recipe = apply_overrides(options.recipe, ("student.init=identity", "student.keep={}", *overrides))
    with atomic_directory(run.path, manifest=False, needed=weight_bytes(student)) as folder_of_run:
        made = RunFolder(folder_of_run)
        with atomic_directory(made.final) as final:
            save_student(student, tokenizer, final)
        write_text(made.recipe_file, dump_recipe(recipe))
        write_json(made.teacher_file, _teacher_facts(source, folder, teacher))
        write_json(made.student_file, spec.to_json())
        write_json(made.results_file, {"name": name, "teacher": {}, "stages": {}, "imported": source})
    report(f"{run.path} holds {spec.num_parameters:,} parameters in {len(spec.layer_specs)} layers")
    return run


def _tokenizer(folder: Path, teacher: ResolvedTeacher | None, config: Any) -> PreTrainedTokenizerBase:
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return load_tokenizer(folder, config.vocab_size, config.to_dict())
    if teacher is None:
        raise TeacherError(
            f"{folder} has no tokenizer, as the released checkpoints", hint="name the model it was made from: --teacher"
        )
    return load_tokenizer(teacher.require_folder(), config.vocab_size, teacher.config.to_dict())


def _teacher_facts(source: str, folder: Path, teacher: ResolvedTeacher | None) -> dict[str, Any]:
    """What teacher.json records; without a teacher the checkpoint stands for it: there is nothing to compare with."""
    if teacher is None:
        return {"source": source, "folder": str(folder.resolve()), "files": {}}
    return {
        **teacher.spec.to_json(),
        "folder": str(teacher.require_folder().resolve()),
        "files": teacher.file_hashes,
        "text_files": teacher.text_hashes,
    }
