"""A tokenizer made on the fly: one token per byte of UTF-8, so that tests can say what the ids must be."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

NUM_BYTES = 256
BOS, EOS = 256, 257


def bytes_tokenizer(*, bos: bool = True, eos: bool = True, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Make the tokenizer, with or without ``<s>`` (id 256) and ``</s>`` (id 257) at the borders of a document."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary |= {"<s>": BOS, "</s>": EOS}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens(["<s>", "</s>"])
    borders = {"bos_token": "<s>"} if bos else {}
    borders |= {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **borders)
