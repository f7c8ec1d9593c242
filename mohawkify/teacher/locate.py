"""Find a teacher: a local folder, a config.json, or a model on the Hugging Face Hub. Nothing is executed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mohawkify.demo import TEACHER_DIRECTORY
from mohawkify.errors import TeacherError
from mohawkify.teacher.validate import require_config, require_own_files

DEMO = "demo"
LONGEST_NAME = 255  # bytes, on every common file system

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights as safetensors, configuration and tokenizer as data; never pickles, never code.
WEIGHTS = "*.safetensors"
WANTED_FILES = ("*.json", WEIGHTS, "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja")


def teacher_name(source: str) -> str:
    """The last part of a teacher's path or Hub id; a config.json is named by its file or, if plain, by its folder."""
    path = _local(source)
    if path.suffix == ".json":
        return path.resolve().parent.name if path.stem == "config" else path.stem
    return path.resolve().name if os.path.exists(path) else source.rsplit("/", 1)[-1]


def find_config(source: str) -> Path:
    """The teacher's config.json; from the Hub only this one file is fetched.

    Raises:
        TeacherError: there is no such teacher, or its sizes are none that a model has.
    """
    path = _find_config(source)
    require_config(path)
    return path


def _find_config(source: str) -> Path:
    path = _local(source)
    if path.is_file() and path.suffix == ".json":
        return path
    if path.is_dir():
        require_own_files(path)
        return _required(path / "config.json", source)
    _require_hub_id(source)
    from huggingface_hub import hf_hub_download

    with _hub_errors(source):
        return Path(hf_hub_download(source, "config.json"))


def find_folder(source: str) -> Path:
    """The folder with the teacher's configuration, weights and tokenizer; fetched from the Hub if need be.

    Raises:
        TeacherError: there is no such teacher, or only a config.json was given.
    """
    return _find_folder(source, WANTED_FILES)


def find_tokenizer_folder(source: str) -> Path:
    """As `find_folder`, but from the Hub no weights are fetched."""
    return _find_folder(source, tuple(pattern for pattern in WANTED_FILES if pattern != WEIGHTS))


def _find_folder(source: str, patterns: tuple[str, ...]) -> Path:
    path = _local(source)
    if path.is_dir():
        _required(path / "config.json", source)
        return path
    if path.is_file():
        raise TeacherError(
            f"{source} is a file, expected a folder with weights or a Hub id",
            hint="a config.json alone is enough for `mohawkify inspect` and `mohawkify plan` only",
        )
    _require_hub_id(source)
    from huggingface_hub import snapshot_download

    with _hub_errors(source):
        return Path(snapshot_download(source, allow_patterns=list(patterns)))


def _local(source: str) -> Path:
    """The local path a source means; ``demo`` is the embedded teacher, unless a folder of that name is here."""
    path = Path(source)
    # Asking for a name that no file system has is an error of its own kind, whose message quotes all of it.
    if "\0" in source or any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        raise TeacherError(f"no such teacher: {source[:100]!r}... is no name of a file")
    return TEACHER_DIRECTORY if source == DEMO and not path.exists() else path


def _required(path: Path, source: str) -> Path:
    if not path.is_file():
        raise TeacherError(f"{source} holds no config.json", hint="a teacher is a Hugging Face model folder")
    return path


def _require_hub_id(source: str) -> None:
    if not HUB_ID.fullmatch(source) or ".." in source:
        raise TeacherError(
            f"no such teacher: {source} is neither a folder, a config.json nor a Hub id",
            hint="a Hub id looks like meta-llama/Llama-3.2-1B-Instruct",
        )


class _hub_errors:
    """Turns the Hub client's errors into one line."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception):
            return
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TeacherError(
            f"no such teacher: {self.source} is no local folder and could not be fetched from the Hub ({first})",
            hint="check the name and the network; a gated model needs `hf auth login`",
        ) from error
