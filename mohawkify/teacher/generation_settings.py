"""The generation settings that a student inherits: special tokens, sampling, the largest number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig

_FLAGS = ("do_sample",)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_COUNTS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size")
_NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty")


def plain_generation(settings: GenerationConfig, vocab_size: int) -> GenerationConfig:
    """Keep the generation settings that are plain data of an expected kind; drop the others.

    Dropped are settings that call for code, another model, or another way of generating: ``custom_generate``, beams,
    assistants, constraints, stop strings, caches and more.

    Args:
        settings: as transformers read them.
        vocab_size: rows of the embedding.

    Raises:
        ValueError: a setting that is kept has a value that it cannot have.
    """

    def is_token(value: Any) -> bool:
        return type(value) is int and 0 <= value < vocab_size

    def are_tokens(value: Any) -> bool:
        return all(map(is_token, value)) if isinstance(value, list) else is_token(value)

    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(_FLAGS, (lambda value: isinstance(value, bool), "true or false")),
        **dict.fromkeys(_TOKENS, (are_tokens, f"a token id below {vocab_size:,}")),
        **dict.fromkeys(_COUNTS, (lambda value: type(value) is int and 0 <= value < 2**31, "a whole number from 0")),
        **dict.fromkeys(_NUMBERS, (lambda value: type(value) in (int, float) and value >= 0, "a number from 0")),
    }
    kept: dict[str, Any] = {}
    for key, (fits, expected) in kinds.items():
        value = getattr(settings, key, None)
        if value is None:
            continue
        # -1 is how some files say that there is none; a [PAD] behind the last row pads nothing here.
        if key == "pad_token_id" and type(value) is int and (value == -1 or value >= vocab_size):
            continue
        if not fits(value):
            raise ValueError(f"{key} is {str(value)[:40]!r}, expected {expected}")
        kept[key] = value
    return GenerationConfig(**kept)
