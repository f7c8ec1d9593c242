"""Load a teacher's or a student's tokenizer, by the classes of transformers that need nothing but its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, TokenizersBackend
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from mohawkify.errors import MohawkifyError, TeacherError, is_out_of_memory, is_panic
from mohawkify.teacher.no_remote_code import never_ask
from mohawkify.teacher.tokenizer_files import (
    SETTINGS_FILE,
    TOKENIZER_FILE,
    has_vocabulary,
    names_of_files,
    require_distinct_ids,
    require_tokenizer_files,
    tokenizer_settings,
)
from mohawkify.teacher.validate import require_config

# transformers reads these with `TokenizersBackend`.
_STANDS_FOR_ANY = ("PythonBackend", "PreTrainedTokenizer")


def load_tokenizer(
    folder: Path, vocab_size: int, config_values: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and check that its tokens have rows in the embedding, and ids of their own.

    Rows without a token are fine: vocabularies are padded. So are added tokens without a row, such as ``[PAD]`` or a
    token for images behind the last row; a text that brings one is refused, by `require_rows`.

    Args:
        folder: of the teacher or the student, with its config.json.
        vocab_size: rows of the embedding.
        config_values: the content of config.json; None reads it.

    Raises:
        TeacherError: no tokenizer, damaged files, a class that is no tokenizer, token ids beyond the embedding that
            every text may bring, or two tokens with one id.
        CheckpointError: not strict JSON.
    """
    never_ask()
    require_tokenizer_files(folder)
    settings = tokenizer_settings(folder)
    _require_tokenizer_class(folder / SETTINGS_FILE, settings.get("tokenizer_class"))
    if not has_vocabulary(folder):  # transformers would make up one of no words
        raise _unusable(folder, "no tokenizer.json, no vocabulary")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    options |= dict.fromkeys(names_of_files(settings))  # which are not followed
    family = _family(folder / "config.json", config_values)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=family, **options)
        if (folder / TOKENIZER_FILE).is_file():
            tokenizer = _as_in_its_file(tokenizer, folder, settings, options)
        vocabulary = tokenizer.get_vocab()
    except BaseException as error:
        # A panic in the tokenizers library is no Exception, but it is what a damaged file does to it.
        if isinstance(error, MohawkifyError) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        if is_out_of_memory(error):
            raise
        raise _unusable(folder, " ".join(str(error).split())[:200]) from error
    _require_row_for_all_texts(tokenizer, vocabulary, vocab_size)
    require_distinct_ids(folder, vocabulary)
    return tokenizer


def _as_in_its_file(made: Any, folder: Path, settings: Mapping[str, Any], options: dict[str, Any]) -> Any:
    """A tokenizer that cuts text as tokenizer.json says, whatever class tokenizer_config.json names.

    Many classes of transformers keep the vocabulary of the file and put rules of their own in the place of its own:
    numbers are cut elsewhere, blanks get lost.

    Args:
        made: the tokenizer of the named class; special tokens that it brings are kept where the file has them.
        folder: of the tokenizer.
        settings: of tokenizer_config.json.
        options: for ``from_pretrained``.

    Raises:
        TeacherError: tokenizer_config.json contradicts it, or transformers does not take it as it is.
    """
    path = folder / TOKENIZER_FILE
    own = Tokenizer.from_file(str(path))
    require_distinct_ids(folder, own.get_vocab())
    rules = _rules(own)
    if _rules(made.backend_tokenizer) == rules:
        return made
    as_made, as_own = (each.encode("a", add_special_tokens=False).tokens for each in (made.backend_tokenizer, own))
    if settings.get("add_prefix_space") is not None and as_made != as_own:
        raise TeacherError(
            f"{folder / SETTINGS_FILE} says add_prefix_space is {settings['add_prefix_space']}, which makes {as_made}"
            f" of 'a'; {TOKENIZER_FILE} makes {as_own}",
            hint="remove the key, or put right the file",
        )
    known = {key: token for key, token in made.special_tokens_map.items() if own.token_to_id(str(token)) is not None}
    found = TokenizersBackend.from_pretrained(folder, **options, **known)
    if _rules(found.backend_tokenizer) != rules:
        raise TeacherError(f"transformers {transformers.__version__} does not cut text as {path} says")
    return found


def _rules(backend: Tokenizer) -> list[bytes | None]:
    """All that decides how plain text is cut and put together again, as the library writes it down."""
    parts = (backend.normalizer, backend.pre_tokenizer, backend.model, backend.decoder)
    return [None if part is None else part.__getstate__() for part in parts]


def _require_row_for_all_texts(tokenizer: Any, vocabulary: Mapping[str, int], vocab_size: int) -> None:
    """Refuse a token without a row that is not an added one, or that stands at the borders of documents."""
    added = tokenizer.get_added_vocab()
    if not vocabulary or any(number >= vocab_size for token, number in vocabulary.items() if token not in added):
        raise TeacherError(
            f"the tokenizer has token id {max(vocabulary.values(), default=-1)}, but the model's vocabulary has"
            f" {vocab_size} rows",
            hint="tokenizer and weights belong to different models",
        )
    for kind in ("bos_token", "eos_token"):
        number = getattr(tokenizer, f"{kind}_id")
        if number is not None and number >= vocab_size:
            raise TeacherError(
                f"the tokenizer's {kind} {getattr(tokenizer, kind)!r} has id {number}, but the model's vocabulary has"
                f" {vocab_size} rows",
                hint="tokenizer and weights belong to different models",
            )


def _unusable(folder: Path, reason: str) -> TeacherError:
    return TeacherError(
        f"{folder} has no usable tokenizer ({reason})", hint="expected tokenizer.json beside the weights"
    )


def _family(path: Path, values: Mapping[str, Any] | None) -> Any:
    """The keys by which transformers chooses the tokenizer's class: the model type and the class in config.json.

    Left to itself it would read the whole configuration, and follow what else that names.
    """
    facts = require_config(path) if values is None else values
    model_type, tokenizer_class = facts.get("model_type"), facts.get("tokenizer_class")
    _require_tokenizer_class(path, tokenizer_class)
    config: Any = PreTrainedConfig()
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING and not model_type.startswith("mohawk_"):
        config = CONFIG_MAPPING[model_type]()
    config.model_type = model_type
    config.tokenizer_class = tokenizer_class
    return config


def _require_tokenizer_class(path: Path, name: object) -> None:
    """Refuse a name by which transformers would find anything but a tokenizer that is made of tokenizer.json alone.

    It looks the name up among all its exports and calls the result. An unknown name is ignored.
    """
    if name is None:
        return
    if not isinstance(name, str):
        raise TeacherError(f"{path} says tokenizer_class is {str(name)[:100]!r}, expected the name of a class")
    bare = name.removesuffix("Fast")
    for spelling in (name, bare, f"{bare}Fast"):  # all of which it tries
        found = tokenizer_class_from_name(spelling)
        is_known = isinstance(found, type) and issubclass(found, TokenizersBackend)
        if found is not None and not is_known and spelling not in _STANDS_FOR_ANY:
            raise TeacherError(
                f"{path} says tokenizer_class is {name[:100]!r}, expected a tokenizer that reads tokenizer.json",
                hint="convert it once with transformers' AutoTokenizer and save it beside the model",
            )
