"""Documents to token ids: one rule for their borders, and the identity of a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from mohawkify.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_DTYPE = np.dtype("<u4")

# The fast tokenizers work on a batch in parallel: enough documents to keep them busy, few enough to hold in memory.
_DOCUMENTS_AT_ONCE = 512
_CHARACTERS_AT_ONCE = 2_000_000


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what a tokenizer does: its vocabulary with ids, merges, normalisation and added tokens.

    Names, paths, and the padding and truncation that happen to be switched on do not count.

    Raises:
        DataError: if the tokenizer is not backed by the tokenizers library.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json",
            hint="convert it once with transformers' AutoTokenizer and save it beside the model",
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("padding", "truncation"):
        content.pop(setting, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def encode_documents(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Iterator[np.ndarray]:
    """Yield each document's token ids, borders marked.

    The rule for borders: a tokenizer that has a BOS token puts it in front of every document; one that has only EOS
    puts that behind; one that has neither leaves the text alone. A token that is there already, as chat templates
    write it, is not doubled.

    Args:
        texts: non-empty documents.
        tokenizer: the teacher's.
        vocab_size: rows of the teacher's embedding.

    Returns:
        One array (l,) of unsigned 32-bit ids per document, l >= 1.

    Raises:
        DataError: if an id has no row in the embedding.
    """
    for batch in _batches(texts):
        for text, ids in zip(batch, _encode(batch, tokenizer), strict=True):
            tokens = np.array(_with_border(text, ids, tokenizer), dtype=TOKEN_DTYPE)
            if tokens.size == 0:  # a tokenizer without BOS and EOS may normalise a text away
                continue
            if tokens.max() >= vocab_size:
                raise DataError(
                    f"the tokenizer gives id {tokens.max()}, but the teacher's vocabulary has {vocab_size} entries",
                    hint="tokenizer and model do not belong together: fetch both from the same place",
                )
            yield tokens


def _encode(batch: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # Special tokens are ours to place; verbose=False silences a warning about texts longer than the window.
    encoded = tokenizer(
        batch, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return encoded["input_ids"]


def _with_border(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None:
        return ids if ids[:1] == [begin] else [begin, *ids]
    # Chat templates may write a newline after the last EOS.
    if end is not None and not text.rstrip().endswith(tokenizer.eos_token):
        return [*ids, end]
    return ids


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _DOCUMENTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
