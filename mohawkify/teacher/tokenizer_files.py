"""Validates the files of a tokenizer before transformers reads them. No torch here.

transformers takes more from these files than text: the class that reads them, files elsewhere, arguments of functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mohawkify.errors import TeacherError
from mohawkify.files.atomic import file_sha256
from mohawkify.files.safetensors_headers import read_json_object, refuse_pointer, require_own_files

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
# Read without a tokenizer.json, by the classes that use them.
VOCABULARY_FILES = (
    *("tokenizer.model", "spm.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
GENERATION_FILE = "generation_config.json"
# Those that are part of a run's identity, as the weights are.
OF_THE_TEACHER = (TOKENIZER_FILE, "tokenizer.model", SETTINGS_FILE)

_NAMES = (TOKENIZER_FILE, SETTINGS_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, *VOCABULARY_FILES, TEMPLATE_FILE)

# Arguments of transformers' tokenizers that name files; they are followed from the current folder, wherever they lead.
_NAMES_OF_FILES = ("gguf_file", "vocab", "merges")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that decide what its tokenizer does, chat templates included; not all need be there."""
    templates = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    return [path for path in (*(folder / name for name in _NAMES), *templates) if path.is_file()]


def text_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of what else than `OF_THE_TEACHER` decides how text becomes tokens and how a student writes.

    transformers reads vocabularies where there is no tokenizer.json, all others beside it (measured with 5.23).
    """
    files = [*tokenizer_files(folder), folder / GENERATION_FILE]
    names = {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}
    return {name: file_sha256(file) for name, file in names.items() if name not in OF_THE_TEACHER}


def has_vocabulary(folder: Path) -> bool:
    """Whether there is a file to take tokens from."""
    return any((folder / name).is_file() for name in (TOKENIZER_FILE, *VOCABULARY_FILES))


def require_tokenizer_files(folder: Path) -> None:
    """Refuse tokenizer files that are damaged, are pointers, or hold more than tokens and their rules.

    Raises:
        TeacherError: not a file, a link or a name that leads out of the folder, arguments for a function, or anything
            but special tokens where special tokens are listed.
        CheckpointError: not strict JSON.
    """
    require_own_files(folder)
    paths = (*(folder / name for name in _NAMES), *(folder / TEMPLATE_FOLDER).glob("*.jinja"))
    present = {path.name for path in paths if _is_file(path)}
    for name, check in (
        (TOKENIZER_FILE, read_json_object),
        (SETTINGS_FILE, _require_plain_settings),
        (SPECIAL_TOKENS_FILE, _require_special_tokens),
        (ADDED_TOKENS_FILE, _require_added_tokens),
    ):
        if name in present:
            check(folder / name)


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json; nothing where there is none."""
    path = folder / SETTINGS_FILE
    return read_json_object(path) if path.is_file() else {}


def names_of_files(settings: Mapping[str, Any]) -> list[str]:
    """The settings that name files.

    Published ones are leftovers of the machine they were written on. What the folder itself has is found by its name.
    """
    return [key for key, value in settings.items() if (key in _NAMES_OF_FILES or key.endswith("_file")) and value]


def require_distinct_ids(folder: Path, vocabulary: Mapping[str, int]) -> None:
    """Refuse a vocabulary in which two tokens have one id: text would come back as other text."""
    owners: dict[int, str] = {}
    for token, number in vocabulary.items():
        if number in owners:
            first, second = sorted((owners[number], token))
            raise TeacherError(
                f"the tokenizer in {folder} gives id {number} to two tokens: {first!r:.40} and {second!r:.40}",
                hint="its files are damaged or of different models: download them again",
            )
        owners[number] = token


def _is_file(path: Path) -> bool:
    """Whether it is there to be read; a pipe would be waited for without end."""
    if not path.exists():
        return False
    if not path.is_file():
        raise TeacherError(f"{path} is no file")
    refuse_pointer(path)
    return True


def _require_plain_settings(path: Path) -> None:
    settings = read_json_object(path)
    if settings.get("init_inputs"):
        raise TeacherError(f"{path} has init_inputs, arguments for a function", hint="remove the key init_inputs")
    listed = settings.get("fast_tokenizer_files") or []
    if listed != [TOKENIZER_FILE] and listed:
        raise TeacherError(
            f"{path} names {str(listed)[:100]!r} as fast_tokenizer_files, expected {TOKENIZER_FILE} alone",
            hint="remove the key fast_tokenizer_files",
        )


def _require_special_tokens(path: Path) -> None:
    for key, value in read_json_object(path).items():
        if not key.endswith(("_token", "_tokens")):
            raise TeacherError(f"{path} has {key!r:.100}, expected special tokens alone", hint="remove the key")
        tokens = _several(value) if key.endswith("_tokens") else [value]
        if not all(_is_token(token) for token in tokens):
            raise TeacherError(f"{path} says {key} is {str(value)[:100]!r}, expected a token, or several")


def _several(value: Any) -> list[Any]:
    """The tokens of a list, or of an object that gives each a name."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else [value]


def _is_token(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None or isinstance(value, str)
    return all(
        isinstance(item, str) if key in ("content", "__type") else key in _FLAGS and isinstance(item, bool)
        for key, item in value.items()
    )


def _require_added_tokens(path: Path) -> None:
    for token, number in read_json_object(path).items():
        if type(number) is not int or number < 0:
            raise TeacherError(f"{path} gives {token!r:.40} the id {str(number)[:40]!r}, expected a whole number")
