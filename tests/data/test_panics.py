"""What the Rust of the tokenizers library cannot do ends in one clear line, as every other error does."""

from __future__ import annotations

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from mohawkify.cli import options
from mohawkify.data.tokenize import Document, encode_documents
from mohawkify.errors import BUG, DataError, is_panic
from tests.bytes_tokenizer import bytes_tokenizer
from tests.commands import run

BACKTRACKING = Document("x" * 40 + " end")


def tokenizer_with_pattern(pattern: str):
    tokenizer = bytes_tokenizer()
    split = Split(Regex(pattern), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False)])
    return tokenizer


def test_a_pattern_that_never_ends_is_an_error_of_the_text() -> None:
    with pytest.raises(DataError, match="the teacher's tokenizer breaks down on this text"):
        encode_documents([BACKTRACKING], tokenizer_with_pattern("(x+x+)+y"), 258)


def test_any_other_panic_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        tokenizer_with_pattern("(x+x+)+y")(BACKTRACKING.text)
    except BaseException as error:
        panic = error
    assert is_panic(panic)
    assert not isinstance(panic, Exception)

    def give_up(*arguments: object) -> None:
        raise panic

    monkeypatch.setattr(options, "chosen_recipe", give_up)
    result = run("convert", "demo", "--recipe", "llamba-1b")
    assert result.exit_code == BUG
    assert "error: unexpected PanicException" in result.stderr
    assert "Traceback" not in result.stderr
