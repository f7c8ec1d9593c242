"""Find a teacher: a local folder, a GGUF file, a config.json, or a model on the Hub. Nothing is executed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from mohawkify.demo import TEACHER_DIRECTORY
from mohawkify.errors import MohawkifyError, TeacherError, cache_hint
from mohawkify.files.safetensors_headers import GGUF, refuse_gguf_alone, require_own_files

DEMO = "demo"
LONGEST_NAME = 255  # bytes, on every common file system

TERMS = ("README.md", "LICEN*", "NOTICE*", "COPYING*", "USE_POLICY*")  # which hold for what is made of the model
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights as safetensors, configuration and tokenizer as data; never pickles, never code.
WEIGHTS = "*.safetensors"
TEXT_FILES = ("*.json", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja")

Need = Literal["config", "tokenizer", "weights"]


def teacher_name(source: str) -> str:
    """The last part of a teacher's path or Hub id; a config.json is named by its file or, if plain, by its folder."""
    path = _local(source)
    if path.suffix == ".json":
        return path.resolve().parent.name if path.stem == "config" else path.stem
    if path.suffix == GGUF:
        return path.stem
    return path.resolve().name if os.path.exists(path) else source.rsplit("/", 1)[-1]


def gguf_file(source: str) -> Path | None:
    """The GGUF file that a source names; None where it names anything else.

    Raises:
        TeacherError: there is no such file.
    """
    path = _local(source)
    if path.suffix != GGUF or path.is_dir():
        return None
    if not path.is_file():
        raise TeacherError(f"no such teacher: there is no file {source}")
    return path


def locate(source: str, need: Need) -> tuple[Path, Path | None]:
    """Find a teacher's config.json and, if there is one, its folder; files of the Hub are fetched.

    Args:
        source: a Hub id, a folder or a config.json.
        need: what is fetched from the Hub: ``config`` alone, the ``tokenizer`` too, or the ``weights`` too.

    Raises:
        TeacherError: there is no such teacher, or only a config.json was given and more is needed.
    """
    path = _local(source)
    if path.is_dir():
        require_own_files(path)
        return _required(path / "config.json", source), path
    if path.is_file() and need != "config":
        raise TeacherError(
            f"{source} is a file, expected a folder with weights or a Hub id",
            hint="a config.json alone is enough for `mohawkify inspect` and `mohawkify plan` only",
        )
    if path.is_file() and path.suffix == ".json":
        return path, None
    if os.path.lexists(path):
        raise TeacherError(
            f"{source} is neither a folder, a GGUF file nor a config.json", hint="name the folder it lies in"
        )
    if not HUB_ID.fullmatch(source) or ".." in source:
        raise TeacherError(
            f"no such teacher: {source} is neither a folder, a GGUF file, a config.json nor a Hub id",
            hint="a Hub id looks like meta-llama/Llama-3.2-1B-Instruct",
        )
    try:
        config_file, folder = _fetch(source, need)
    except MohawkifyError:
        raise
    except Exception as error:  # the Hub's client, its network and its cache have no common class
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TeacherError(
            f"no such teacher: {source} is no local folder and could not be fetched from the Hub ({first})",
            hint=cache_hint(error) or "check the name and the network; a gated model needs `hf auth login`",
        ) from error
    return config_file if folder is None else _required(config_file, source), folder


def _fetch(source: str, need: Need) -> tuple[Path, Path | None]:
    """Fetch files of the Hub: the config.json alone, or the folder too; errors are the libraries'."""
    from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if need == "config":
        try:
            return Path(hf_hub_download(source, "config.json")), None
        except RemoteEntryNotFoundError:
            refuse_gguf_alone(source, list_repo_files(source))
            raise
    patterns = TEXT_FILES if need == "tokenizer" else (*TEXT_FILES, WEIGHTS)
    folder = Path(snapshot_download(source, allow_patterns=[*patterns, *TERMS]))
    if not (folder / "config.json").is_file() or (need == "weights" and not any(folder.glob(WEIGHTS))):
        refuse_gguf_alone(source, list_repo_files(source))
    return folder / "config.json", folder


def _local(source: str) -> Path:
    """The local path of a source; ``demo`` is the embedded teacher, unless a folder of that name is here."""
    path = Path(source)
    # The system call for such a name raises an error whose message quotes the whole name.
    if "\0" in source or any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        raise TeacherError(f"no such teacher: {source[:100]!r}... is no name of a file")
    return TEACHER_DIRECTORY if source == DEMO and not path.exists() else path


def _required(path: Path, source: str) -> Path:
    if not path.is_file():
        refuse_gguf_alone(source, [entry.name for entry in path.parent.iterdir()])
        raise TeacherError(f"{source} holds no config.json", hint="a teacher is a Hugging Face model folder")
    return path
