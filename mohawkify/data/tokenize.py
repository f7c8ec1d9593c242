"""Documents to token ids: one rule for their borders, and the identity of a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mohawkify.errors import DataError, is_panic

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

TOKEN_DTYPE = np.dtype("<u4")


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


class Document(NamedTuple):
    """A document on its way to tokens.

    Args:
        text: the text.
        completions: the parts of it (first character, character behind the last) whose tokens are completions; None
            where every token counts as one, as in plain text.
    """

    text: str
    completions: tuple[tuple[int, int], ...] | None = None


class Encoded(NamedTuple):
    """The tokens of a document; there may be none.

    Args:
        tokens: (l,) unsigned 32-bit ids, borders marked.
        completion: (l,) bool, which of them are completions.
    """

    tokens: np.ndarray
    completion: np.ndarray


def encode_documents(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> list[Encoded]:
    """Give each document's token ids, borders marked.

    The rule for borders: a tokenizer that has a BOS token puts it in front of every document; one that has only EOS
    puts that behind; one that has neither leaves the text alone. A token that is there already, as chat templates
    write it, is not doubled. A token is a completion if a character of it is; one that stands for no character, if the
    character before it is.

    Args:
        documents: non-empty documents.
        tokenizer: the teacher's.
        vocab_size: rows of the teacher's embedding.

    Raises:
        DataError: if an id has no row in the embedding, or the tokenizer breaks down.
    """
    if not documents:
        return []
    spans_wanted = any(document.completions is not None for document in documents)
    found = _tokenise([document.text for document in documents], tokenizer, spans_wanted)
    encoded = []
    for number, document in enumerate(documents):
        ids = found["input_ids"][number]
        completion = np.ones(len(ids), dtype=bool)
        if document.completions is not None:
            completion = _in_spans(found["offset_mapping"][number], document.completions)
        encoded.append(_with_border(document, ids, completion, tokenizer))
        tokens = encoded[-1].tokens
        require_rows(tokens, tokenizer, vocab_size)
    return encoded


def require_rows(ids: ArrayLike, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse token ids of a text that have no row in the embedding.

    Args:
        ids: of the text.
        tokenizer: that gave them.
        vocab_size: rows of the embedding.

    Raises:
        DataError: names the token.
    """
    largest = int(np.max(np.asarray(ids), initial=0))
    if largest >= vocab_size:
        raise DataError(
            f"the text has the token {tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}), but the model's"
            f" vocabulary has {vocab_size} rows",
            hint="leave that token out of the text: the model has no weights for it",
        )


def _tokenise(texts: list[str], tokenizer: PreTrainedTokenizerBase, spans_wanted: bool) -> Any:
    """The tokenizer's output for each text without special tokens, which are added later."""
    try:
        return tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=spans_wanted,
            verbose=False,  # silences a warning about texts longer than the window
        )
    except BaseException as error:
        if not is_panic(error):
            raise
        # A pattern in tokenizer.json that never ends is stopped so by the library.
        raise DataError(
            f"the teacher's tokenizer breaks down on this text: {' '.join(str(error).split())[:200]}",
            hint="its tokenizer.json is damaged, or a pattern in it fits no such text: fetch it again",
        ) from error


def _in_spans(characters: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens, each of the characters from one place up to another, lie in a span at least in part."""
    first_l, behind_l = np.array(characters, dtype=np.int64).reshape(-1, 2).T
    inside_l = np.zeros(len(first_l), dtype=bool)
    for start, end in spans:
        # Byte-level tokenizers cut blanks off the characters they report: a token of blanks alone has none left.
        begins_l = np.where(first_l < behind_l, first_l, behind_l - 1)
        inside_l |= (start < behind_l) & (begins_l < end)
    return inside_l


def _with_border(document: Document, ids: list[int], completion: np.ndarray, tokenizer: Any) -> Encoded:
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    is_plain = document.completions is None
    if begin is not None and ids[:1] != [begin]:
        ids, completion = [begin, *ids], np.concatenate([[is_plain], completion])
    # Chat templates may write a newline after the last EOS.
    elif begin is None and end is not None and not document.text.rstrip().endswith(tokenizer.eos_token):
        last = bool(completion[-1]) if ids else is_plain
        ids, completion = [*ids, end], np.concatenate([completion, [last]])
    return Encoded(np.array(ids, dtype=TOKEN_DTYPE), completion)
