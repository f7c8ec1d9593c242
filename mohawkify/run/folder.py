"""A run's folder: what lies where, and which run is meant when none is named. No torch here."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mohawkify.errors import CheckpointError, UsageError
from mohawkify.files.atomic import read_json, verify_directory, write_json
from mohawkify.recipe.loading import comparable_text, load_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.student.layer_spec import read_layer_specs

RUNS = Path("runs")
CORPUS_KEY = re.compile(r"[0-9a-f]{16}")


def run_identity(recipe: Recipe, teacher_files: Mapping[str, str]) -> str:
    """A hash of a run's recipe and its teacher's files, which identifies its checkpoints."""
    return hashlib.sha256((comparable_text(recipe) + repr(sorted(teacher_files.items()))).encode()).hexdigest()


def changed_files(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The names under which two sets of hashes differ, sorted."""
    return sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))


class _Inside:
    """A path inside a run's folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunFolder, owner: type) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """The files of one conversion; docs/architecture.md lists their contents."""

    path: Path

    recipe_file = _Inside("recipe.yaml")
    plan_file = _Inside("plan.json")
    teacher_file = _Inside("teacher.json")
    student_file = _Inside("student.json")
    metrics_file = _Inside("metrics.jsonl")
    results_file = _Inside("results.json")
    tuning_file = _Inside("tuning.json")
    checkpoints = _Inside("checkpoints")
    corpora = _Inside("corpora")
    text_file = _Inside("text.json")
    tracking_file = _Inside("tracking.json")
    tracking = _Inside("tracking")
    final = _Inside("final")

    def checked_final(self) -> Path:
        """The finished student's folder, every byte as it was written.

        Raises:
            CheckpointError: a file is missing, extra or changed: it was damaged or edited since.
        """
        try:
            verify_directory(self.final)
        except CheckpointError as error:
            raise CheckpointError(
                error.message, hint=f"remove {self.final}: the command that made the run writes it again"
            ) from error
        return self.final

    @property
    def is_finished(self) -> bool:
        """Whether the conversion reached its end."""
        return self.final.is_dir() and self.results_file.is_file()

    def recipe(self) -> Recipe:
        """The recipe the run was made with."""
        return load_recipe(self.recipe_file)

    def teacher(self) -> dict[str, Any]:
        """The teacher's facts as they were recorded: ``source``, ``folder``, ``files`` and what was inspected.

        Raises:
            CheckpointError: the file lacks them.
        """
        facts = read_json(self.teacher_file)
        texts = isinstance(facts, dict) and all(isinstance(facts.get(key), str) for key in ("source", "folder"))
        files = facts.get("files") if texts else None
        if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
            raise CheckpointError(f"{self.teacher_file} does not say which teacher the run was made from")
        return dict(facts)

    def student(self) -> dict[str, Any]:
        """The student's facts as they were recorded; none where they were not.

        Raises:
            CheckpointError: the file lacks them.
        """
        if not self.student_file.is_file():
            return {}
        facts = read_json(self.student_file)
        kinds = {"name": str, "num_parameters": int}
        is_valid = isinstance(facts, dict) and all(isinstance(facts.get(k, kind()), kind) for k, kind in kinds.items())
        try:
            read_layer_specs({"layer_specs": [], **facts} if is_valid else {})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.student_file} does not say which student the run is to make") from error
        return dict(facts)

    def teacher_files(self) -> dict[str, str]:
        """The hashes that the run's identity is made of: those of the teacher, and of what finishes the run.

        Raises:
            CheckpointError: the file lacks them.
        """
        facts = self.teacher()
        final_phase = facts.get("final_teacher_files", {})
        if not isinstance(final_phase, dict) or not all(isinstance(value, str) for value in final_phase.values()):
            raise CheckpointError(f"{self.teacher_file} does not say which teacher finishes the run")
        return facts["files"] | final_phase

    def text_files(self) -> dict[str, str] | None:
        """The hashes of the teacher's files that decide how text is cut and written, which are no part of the identity.

        Returns:
            None for a run that was begun before they were recorded.

        Raises:
            CheckpointError: the file lacks them.
        """
        files = self.teacher().get("text_files")
        is_sound = isinstance(files, dict) and all(isinstance(value, str) for value in files.values())
        if files is not None and not is_sound:
            raise CheckpointError(f"{self.teacher_file} does not say how its teacher cuts text")
        return files

    def text(self) -> dict[str, dict[str, str]]:
        """What the run reads, by part of the recipe's data: its ``key``, the name in corpora/, and its ``fingerprint``.

        Returns:
            Nothing for a run that was begun before this was recorded.

        Raises:
            CheckpointError: the file lacks them.
        """
        facts = read_json(self.text_file) if self.text_file.is_file() else {}
        if not isinstance(facts, dict) or not all(_is_text(each) for each in facts.values()):
            raise CheckpointError(f"{self.text_file} does not say which text the run reads")
        return facts

    def results(self) -> dict[str, Any]:
        """The measurements so far.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not self.results_file.is_file():
            return {"teacher": {}, "stages": {}}
        results = read_json(self.results_file)
        for part in ("teacher", "stages"):
            if not isinstance(results, dict) or not isinstance(results.get(part), dict):
                raise CheckpointError(f"{self.results_file} is damaged: it has no {part}")
        wrong = next(_wrong_results(results), None)
        if wrong:
            raise CheckpointError(f"{self.results_file} is damaged: {wrong}")
        return results

    def best_stage(self) -> tuple[str, int] | None:
        """The stage after which KL was lowest, and the optimizer steps that had been taken; None before the first."""
        stages = self.results()["stages"] if self.results_file.is_file() else {}
        measured = [(stage["kl"], stage["steps"], name) for name, stage in stages.items() if stage.get("steps")]
        if not measured:
            return None
        _, steps, name = min(measured)
        return name, int(steps)

    def write_results(self, results: dict[str, Any]) -> None:
        """Replace the results."""
        write_json(self.results_file, results)


def _is_text(facts: Any) -> bool:
    match facts:
        case {"key": str(key), "fingerprint": str()}:
            return CORPUS_KEY.fullmatch(key) is not None
    return False


def _wrong_results(results: Mapping[str, Any]) -> Iterator[str]:
    """The faults that make a report impossible, in words."""
    if not isinstance(results.get("name"), str | None):
        yield "its name is no text"
    if not _are_numbers({"evaluation_tokens": results.get("evaluation_tokens", 0)}):
        yield "its evaluation_tokens are no number"
    for part in ("teacher", "student"):
        if not _are_numbers(results.get(part, {})):
            yield f"the metrics of the {part} are no numbers"
    for name, stage in results["stages"].items():
        metrics = {key: value for key, value in stage.items() if key != "phases"} if isinstance(stage, dict) else {}
        if not {"tokens", "perplexity", "kl", "top1"} <= metrics.keys() or not _are_numbers(metrics):
            yield f"the metrics of stage {name[:40]} are no numbers, or lack some"
        elif not _are_phases(stage.get("phases", [])):
            yield f"the phases of stage {name[:40]} are none"


def _are_numbers(metrics: Any) -> bool:
    return isinstance(metrics, dict) and all(type(value) in (int, float) for value in metrics.values())


def _are_phases(phases: Any) -> bool:
    kinds = {"data": str, "steps": int, "tokens": int, "ended_by": str}
    return isinstance(phases, list) and all(
        isinstance(phase, dict) and all(isinstance(phase.get(key), kind) for key, kind in kinds.items())
        for phase in phases
    )


def finished_run(path: Path | None, root: Path = RUNS) -> RunFolder:
    """The run that a command means.

    Args:
        path: the run's folder; None for the newest finished run below ``root``.
        root: where runs lie.

    Raises:
        UsageError: there is no such run, or it is not finished.
    """
    if path is not None:
        run = RunFolder(path)
        if not os.path.isdir(path):  # Path.is_dir raises for a name that is too long
            raise UsageError(f"no such run: {path}", hint="a run is a folder written by `mohawkify convert`")
        if not run.is_finished:
            raise UsageError(f"{path} is not a finished run", hint="the same `mohawkify convert` command continues it")
        return run
    candidates = [RunFolder(entry) for entry in sorted(root.iterdir())] if root.is_dir() else []
    finished = [run for run in candidates if run.is_finished]
    if not finished:
        raise UsageError(f"no finished run in {root}/", hint="run `mohawkify convert TEACHER --recipe NAME` first")
    return max(finished, key=lambda run: run.results_file.stat().st_mtime)
