"""The tokenizer in a GGUF file's metadata, built by transformers; refused where it would cut text in another way."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import transformers
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from mohawkify.errors import TeacherError, UsageError, is_out_of_memory, is_panic, quoted
from mohawkify.teacher.gguf_header import GgufFile, damaged

_DIGITS = "smollm"
# The rules by which llama.cpp cuts text before it merges, where transformers has the same; the last is added here.
_RULES = (
    *("default", "gpt-2", "llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "pixtral", "dbrx", "tekken"),
    *("qwen2", "deepseek-r1-qwen", "megrez", "gpt-4o"),
    _DIGITS,
)
_KINDS = ("gpt2", "llama")
_OTHERWISE = "use the model's Hugging Face folder or Hub id"


def require_tokens(file: GgufFile) -> None:
    """Refuse a file whose lists of tokens are none, or do not fit each other; see `read_tokenizer`."""
    lists = {key: file.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type")}
    tokens = lists.pop("tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise TeacherError(
            f"{file.path} holds no tokenizer (no tokenizer.ggml.tokens), which converting text needs", hint=_OTHERWISE
        )
    for key, values in lists.items():
        if values is not None and (not isinstance(values, list) or len(values) != len(tokens)):
            raise damaged(file.path, f"its tokenizer has {len(tokens):,} tokens, which do not fit its {key}")
    if len(set(tokens)) < len(tokens):
        twice = max(Counter(tokens).items(), key=lambda item: item[1])[0]
        raise damaged(file.path, f"its tokenizer lists {quoted(twice)} twice")
    for key in ("bos", "eos", "unknown", "padding", "eot", "eom"):
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id", 0)
        if type(number) is not int or not 0 <= number < len(tokens):
            reason = f"its tokenizer has {len(tokens):,} tokens, but {key}_token_id is {str(number)[:40]}"
            raise damaged(file.path, reason)


def read_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """Build the tokenizer of a GGUF file with `require_tokens`, chat template included.

    Raises:
        TeacherError: it is damaged, or its rules are none of transformers'.
        UsageError: transformers is too old to rebuild one.
    """
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
    except ImportError as error:
        raise UsageError(
            f"a teacher in a GGUF file needs transformers 5.23 or newer, found {transformers.__version__}",
            hint="pip install --upgrade transformers",
        ) from error

    tokens = file.metadata["tokenizer.ggml.tokens"]
    kind, rule = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    for key, value, known in (("model", kind, _KINDS), ("pre", rule, (None, *_RULES))):
        if value not in known:
            raise TeacherError(
                f"{file.path} says tokenizer.ggml.{key} is {str(value)[:40]!r}, which transformers does not rebuild",
                hint=_OTHERWISE,
            )
    template = file.metadata.get("tokenizer.chat_template", "")
    try:
        architecture, lists, settings = get_gguf_tokenizer(str(file.path))
        backend = _without_others(convert_gguf_tokenizer(architecture, lists)[0], len(tokens))
        if rule == _DIGITS:
            backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        tokenizer: Any = TokenizersBackend(tokenizer_object=backend, **settings)
        num_tokens = len(tokenizer)
    except BaseException as error:
        # A panic in the tokenizers library is no Exception, but it is what damaged lists do to it.
        if is_out_of_memory(error) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise TeacherError(f"{file.path} has no usable tokenizer ({type(error).__name__}: {reason})") from error
    if num_tokens != len(tokens):
        raise TeacherError(
            f"{file.path} lists {len(tokens):,} tokens, but transformers makes {num_tokens:,} of them", hint=_OTHERWISE
        )
    if not isinstance(template, str):
        raise damaged(file.path, "its chat template is no text")
    return tokenizer


def _without_others(backend: Tokenizer, num_tokens: int) -> Tokenizer:
    """Remove what transformers' classes add of their own, such as GPT-2's <|endoftext|>: an id without an embedding."""
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < num_tokens]
    return Tokenizer.from_str(json.dumps(content))
