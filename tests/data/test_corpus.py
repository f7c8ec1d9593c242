"""Corpus: tokens and borders as the rule says, made once, re-used, and not believed when damaged."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mohawkify.data import write_corpus
from mohawkify.data.corpus import Corpus, hold_out
from mohawkify.data.tokenize import Document, encode_documents, tokenizer_hash
from mohawkify.data.write_corpus import CorpusRequest, build_corpus
from mohawkify.errors import DataError
from mohawkify.recipe.schema import Source
from tests.bytes_tokenizer import BOS, EOS, bytes_tokenizer

TEXTS = ["Lily had a ball.", "é", "The end of a longer story."]


def write_texts(path: Path, texts: list[str] = TEXTS) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(path=str(path))


def build(directory: Path, *sources: Source, tokenizer: Any = None, vocab_size: int = 258, **options: Any) -> Corpus:
    num_tokens, teacher = options.pop("num_tokens", None), options.pop("teacher_directory", None)
    wanted = CorpusRequest(sources, tokenizer or bytes_tokenizer(), num_tokens, teacher, vocab_size)
    return build_corpus(wanted, directory / "corpora", **options)


def encode(text: str, tokenizer: Any = None) -> list[int]:
    (encoded,) = encode_documents([Document(text)], tokenizer or bytes_tokenizer(), 258)
    return encoded.tokens.tolist()


def folders(directory: Path) -> list[Path]:
    return [path for path in (directory / "corpora").iterdir() if not path.name.startswith(".")]


def lists(corpus: Corpus) -> list[list[int]]:
    return [document.tolist() for document in corpus.documents()]


def by_lengths(*lengths: int) -> Corpus:
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return Corpus(np.arange(offsets[-1], dtype=np.uint32), offsets, "made up")


# --- tokens and borders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bos", "eos", "before", "behind"),
    [(True, True, [BOS], []), (True, False, [BOS], []), (False, True, [], [EOS]), (False, False, [], [])],
)
def test_rule_for_borders(tmp_path: Path, bos: bool, eos: bool, before: list[int], behind: list[int]) -> None:
    tokenizer = bytes_tokenizer(bos=bos, eos=eos)
    corpus = build(tmp_path, write_texts(tmp_path / "a.jsonl"), tokenizer=tokenizer)
    for document, text in zip(lists(corpus), TEXTS, strict=True):
        inner = document[len(before) : len(document) - len(behind)]
        assert document == [*before, *inner, *behind]
        assert len(inner) == len(text.encode())
        assert tokenizer.decode(inner) == text


def test_borders_are_not_doubled() -> None:
    begin, *rest = encode("<s>hi")
    assert begin == BOS
    assert BOS not in rest
    with_newline = encode("hi</s>\n", bytes_tokenizer(bos=False))
    assert with_newline.count(EOS) == 1


def test_tokenizer_that_adds_bos_itself_gives_one() -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    ids = encode("hi", tokenizer)
    assert ids == tokenizer("hi")["input_ids"]
    assert ids.count(BOS) == 1


def test_many_batches_give_what_single_documents_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mohawkify.data.write_corpus._CHARACTERS_AT_ONCE", 30_000)
    texts = [f"story {number} " * (number % 7 + 1) for number in range(1200)] + ["x" * 30_001, "last"]
    together = lists(build(tmp_path, write_texts(tmp_path / "a.jsonl", texts)))
    assert len(together) == len(texts)
    for number in (0, 511, 512, 1023, 1024, 1200, 1201):
        assert together[number] == encode(texts[number])


def test_sources_follow_one_another_and_offsets_fit(tmp_path: Path) -> None:
    first, second = write_texts(tmp_path / "b.jsonl"), write_texts(tmp_path / "a.jsonl", ["second"])
    corpus = build(tmp_path, first, second)
    assert corpus.num_documents == 4
    assert corpus.tokens.dtype == np.uint32
    assert corpus.offsets.dtype == np.int64
    assert corpus.offsets[0] == 0
    assert corpus.offsets[-1] == corpus.num_tokens == len(corpus.tokens)
    assert lists(corpus) == lists(build(tmp_path, first)) + lists(build(tmp_path, second))


@pytest.mark.parametrize("num_tokens", [1, 17, 18, 30, 46, 47, 1000])
def test_num_tokens_cuts_exactly(tmp_path: Path, num_tokens: int) -> None:
    source = write_texts(tmp_path / "a.jsonl")
    whole = build(tmp_path, source)
    assert whole.num_tokens == 17 + 3 + 27
    corpus = build(tmp_path, source, num_tokens=num_tokens)
    np.testing.assert_array_equal(corpus.tokens, whole.tokens[:num_tokens])
    assert corpus.offsets.tolist() == [*[o for o in whole.offsets if o < len(corpus.tokens)], len(corpus.tokens)]


def test_stops_reading_when_it_has_enough(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("this is not JSON")
    good = write_texts(tmp_path / "a.jsonl", TEXTS * 200)  # more than is read ahead for one call of the tokenizer
    assert build(tmp_path, good, Source(path=str(bad)), num_tokens=20).num_documents == 2
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1 is not valid JSON"):
        build(tmp_path, good, Source(path=str(bad)))


def test_progress_counts_tokens(tmp_path: Path) -> None:
    seen: list[int] = []
    build(tmp_path, write_texts(tmp_path / "a.jsonl"), progress=seen.append)
    assert seen == [17, 20, 47]


def test_real_teacher_and_text(tmp_path: Path, stories_teacher: Path, stories_text: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories_teacher)
    source = Source(path="teacher:../text/tinystories.txt")
    corpus = build(tmp_path, source, tokenizer=tokenizer, vocab_size=512, teacher_directory=stories_teacher)
    # The known count of predicted tokens, each story cut at the teacher's window of 512 and begun with BOS.
    assert sum(min(len(document), 512) - 1 for document in corpus.documents()) == 70_407
    stories = (stories_text / "tinystories.txt").read_text().split("<|endoftext|>\n")
    for document, story in zip(corpus.documents(), stories, strict=False):
        assert document.tolist() == tokenizer(story.strip("\n"))["input_ids"]


# --- kept, found again, not believed when damaged -------------------------------------------------------------------


def test_second_call_reads_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_texts(tmp_path / "a.jsonl")
    first = build(tmp_path, source)
    monkeypatch.setattr(write_corpus, "raw_documents", None)  # calling it would now fail
    again = build(tmp_path, source)
    assert lists(again) == lists(first)
    assert again.fingerprint == first.fingerprint


def test_fingerprint_is_that_of_tokens_and_borders(tmp_path: Path) -> None:
    corpus = build(tmp_path, write_texts(tmp_path / "a.jsonl"))
    assert corpus.fingerprint == hashlib.sha256(corpus.tokens.tobytes() + corpus.offsets.tobytes()).hexdigest()
    copy = build(tmp_path, write_texts(tmp_path / "copy.jsonl"))
    assert copy.fingerprint == corpus.fingerprint


def test_other_inputs_make_another_corpus(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl")
    build(tmp_path, source)

    def count() -> int:
        return len(folders(tmp_path))

    assert count() == 1
    build(tmp_path, source, num_tokens=20)
    assert count() == 2
    build(tmp_path, source, tokenizer=bytes_tokenizer(bos=False))
    assert count() == 3
    build(tmp_path, source.model_copy(update={"separator": None}))
    assert count() == 4
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    build(tmp_path, source)
    assert count() == 5


@pytest.mark.parametrize("name", ["shard-00000/tokens.bin", "shard-00000/offsets.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_detected(tmp_path: Path, name: str, damage: str) -> None:
    source = write_texts(tmp_path / "a.jsonl")
    build(tmp_path, source)
    (folder,) = folders(tmp_path)
    content = bytearray((folder / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    elif damage == "truncate":
        (folder / name).write_bytes(content[:-4])
    else:
        (folder / name).unlink()
    with pytest.raises(DataError, match="the tokenised text is damaged") as caught:
        build(tmp_path, source)
    assert str(folder) in str(caught.value.hint)


def test_failure_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbad\n')
    with pytest.raises(DataError, match="line 2"):
        build(tmp_path, Source(path=str(tmp_path / "a.jsonl")))
    assert [path for path in (tmp_path / "corpora").rglob("*") if path.is_file()] == []


# --- what is refused ------------------------------------------------------------------------------------------------


def test_id_beyond_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the token '<s>' \(id 256\), but the model's vocabulary has 256 rows"):
        build(tmp_path, write_texts(tmp_path / "a.jsonl"), vocab_size=256)


def test_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text is given"):
        build(tmp_path)


def test_no_tokens_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 tokens of text are asked for"):
        build(tmp_path, write_texts(tmp_path / "a.jsonl"), num_tokens=0)


# --- the identity of a tokenizer ------------------------------------------------------------------------------------


def test_tokenizer_hash_survives_saving_and_use(tmp_path: Path, stories_teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories_teacher)
    before = tokenizer_hash(tokenizer)
    tokenizer.pad_token = "</s>"
    tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == before


@pytest.mark.parametrize("change", ["swap two ids", "merge", "normalizer"])
def test_tokenizer_hash_sees_the_content(change: str) -> None:
    content = json.loads(bytes_tokenizer().backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    if change == "swap two ids":
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    elif change == "merge":
        vocabulary["ab"] = 258
        content["model"]["merges"] = [["a", "b"]]
    else:
        content["normalizer"] = {"type": "Lowercase"}
    changed = PreTrainedTokenizerFast(
        tokenizer_object=type(bytes_tokenizer().backend_tokenizer).from_str(json.dumps(content))
    )
    assert tokenizer_hash(changed) != tokenizer_hash(bytes_tokenizer())


# --- holding out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "num_tokens", "expected"),
    [
        ([10, 10, 10, 10], 20, 20),  # a border falls on the spot
        ([10, 10, 10, 10], 15, 10),  # documents stay whole
        ([10, 10, 10, 10], 100, 20),  # at most half
        ([30, 1, 1], 9, 9),  # whole documents would be far too few: the cut goes through one
        ([40], 7, 7),
        ([2, 38], 30, 20),
        ([1, 1, 1, 1], 2, 2),
    ],
)
def test_hold_out(lengths: list[int], num_tokens: int, expected: int) -> None:
    corpus = by_lengths(*lengths)
    train, held = hold_out(corpus, num_tokens)
    assert held.num_tokens == expected
    np.testing.assert_array_equal(np.concatenate([train.tokens, held.tokens]), corpus.tokens)
    for part in (train, held):
        assert part.offsets[0] == 0
        assert part.offsets[-1] == part.num_tokens
        assert (np.diff(part.offsets) > 0).all()
    borders = {*train.offsets.tolist(), *(held.offsets + train.num_tokens).tolist()}
    assert borders == {*corpus.offsets.tolist(), train.num_tokens}
    assert len({corpus.fingerprint, train.fingerprint, held.fingerprint}) == 3


@pytest.mark.parametrize(("lengths", "num_tokens"), [([3], 10), ([100], 1), ([100], 0)])
def test_hold_out_of_too_little(lengths: list[int], num_tokens: int) -> None:
    with pytest.raises(DataError, match="cannot hold out"):
        hold_out(by_lengths(*lengths), num_tokens)
