"""What a model card's metadata says: licence, data and measurements, as the Hub's search and filters read them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult

from mohawkify.errors import StorageError
from mohawkify.files.safetensors_headers import require_own_files
from mohawkify.run.folder import RunFolder

LICENCE_FILE = re.compile(r"(LICEN[SC]E|COPYING|NOTICE|USE_POLICY)([.-].*)?", re.IGNORECASE)
LICENCE_KEYS = ("license", "license_name", "license_link")
_LARGEST = 1_000_000  # bytes of a licence or a card
# How the licences begin that most models have, for folders without a card.
_KNOWN = {"apache-2.0": r"Apache License\s+Version 2\.0", "mit": r"(The )?MIT License"}
METRICS = {"perplexity": "perplexity", "kl": "KL(teacher||student), nats per token", "top1": "top-1 agreement"}


def card_facts(run: RunFolder) -> dict[str, Any]:
    """The arguments of a card's data beside its base model: only what is known.

    Raises:
        CheckpointError: the run's facts or results are damaged.
    """
    facts: dict[str, Any] = {**teacher_licence(Path(run.teacher()["folder"]))}
    datasets = sorted({source.hub for source in run.recipe().data.train if source.hub is not None})
    if datasets:
        facts["datasets"] = datasets
    measured = run.results().get("student", {})
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="the run's held-out text",
            metric_type=key,
            metric_name=name,
            metric_value=measured[key],
        )
        for key, name in METRICS.items()
        if key in measured
    ]
    if results:
        facts |= {"model_name": run.results().get("name") or "student", "eval_results": results}
    return facts


def licence_files(folder: Path) -> list[Path]:
    """The files of a teacher that state its terms."""
    if not folder.is_dir():
        return []
    require_own_files(folder)  # no link may lead a stranger's export to a file of this machine
    return sorted(
        path
        for path in folder.iterdir()
        if LICENCE_FILE.fullmatch(path.name) and path.is_file() and path.stat().st_size <= _LARGEST
    )


def teacher_licence(folder: Path) -> dict[str, str]:
    """The licence that a teacher's card or its licence file states, as a card has it; nothing where none does."""
    files, card = licence_files(folder), folder / "README.md"
    if card.is_file() and card.stat().st_size <= _LARGEST:
        stated = card_metadata(card.read_text(encoding="utf-8", errors="replace"))
        if isinstance(stated.get("license"), str):
            return {key: stated[key] for key in LICENCE_KEYS if isinstance(stated.get(key), str)}
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        for name, beginning in _KNOWN.items():
            if re.search(rf"\A[\s#*]*{beginning}", text):
                return {"license": name}
        if path.name.upper().startswith("LICEN"):
            return {"license": "other", "license_name": "teacher", "license_link": path.name}
    return {}


def card_metadata(text: str) -> dict[str, Any]:
    """The YAML in front of a card; nothing where there is none that can be read."""
    found = re.match(r"\A---\r?\n(.*?)\r?\n---\s*?(\r?\n|\Z)", text, re.DOTALL)
    try:
        values = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def carry_licence(run: RunFolder, folder: Path) -> None:
    """Copy the files that state the teacher's terms into an export."""
    for path in licence_files(Path(run.teacher()["folder"])):
        try:
            (folder / path.name).write_bytes(path.read_bytes())
        except OSError as error:
            raise StorageError(f"cannot copy {path}: {error.strerror}") from error
