"""Corpora in the making: mixtures, shards, several processes, kills and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mohawkify.data import write_corpus
from mohawkify.data.corpus import Corpus, checked_facts
from mohawkify.data.write_corpus import CorpusRequest, build_corpus
from mohawkify.errors import CheckpointError, DataError
from mohawkify.files import atomic
from mohawkify.recipe.schema import Source
from tests.bytes_tokenizer import bytes_tokenizer
from tests.conftest import ROOT

CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
SHARD = 900


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_corpus, "_SHARD_TOKENS", SHARD)
    monkeypatch.setattr(write_corpus, "_DOCUMENTS_AT_ONCE", 7)


def write(path: Path, letter: str, number: int, longest: int) -> Path:
    """Documents of one letter, of many lengths, some of them empty or filtered away."""
    rows = [
        {
            "text": letter * (index * 7919 % longest),
            "score": index % 5,
            "talk": [{"role": "user", "content": letter}, {"role": "assistant", "content": letter * (index % 9)}],
        }
        for index in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source(path: Path, **settings: Any) -> Source:
    where = [{"column": "score", "operator": ">", "value": 0}]
    return Source.model_validate({"path": str(path), "where": where, **settings})


def sources(folder: Path, kind: str) -> tuple[Source, ...]:
    a, b = write(folder / "a.jsonl", "a", 60, 90), write(folder / "b.jsonl", "b", 90, 60)
    if kind == "chat":
        return (source(a, chat="talk"), source(b))
    if kind == "mixture":
        return (source(a, weight=0.7), source(b, weight=0.3))
    return (source(a), source(b))


def want(parts: tuple[Source, ...], num_tokens: int | None = None) -> CorpusRequest:
    return CorpusRequest(parts, bytes_tokenizer(chat_template=CHAT), num_tokens, None, 258)


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".checked")
    }


# --- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "chat", "mixture"])
def test_shards_hold_what_one_shard_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    wanted = want(sources(tmp_path, kind))
    whole = build_corpus(wanted, tmp_path / "whole")
    monkeypatch.setattr(write_corpus, "_SHARD_TOKENS", SHARD)
    cut = build_corpus(wanted, tmp_path / "cut")
    folder = tmp_path / "cut" / wanted.key
    facts = checked_facts(folder)
    assert len(facts["shards"]) > 2
    assert cut.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(np.asarray(cut.tokens), whole.tokens)
    np.testing.assert_array_equal(cut.offsets, whole.offsets)
    assert (cut.completion is None) == (whole.completion is None) == (kind != "chat")
    if kind == "chat":
        np.testing.assert_array_equal(np.asarray(cut.completion), whole.completion)
        assert facts["completion_tokens"] == int(np.asarray(cut.completion).sum())
    assert [document.tolist() for document in cut.documents()] == [each.tolist() for each in whole.documents()]
    assert facts["tokens"] == cut.num_tokens == sum(entry["tokens"] for entry in facts["sources"])
    assert facts["documents"] == cut.num_documents == sum(entry["documents"] for entry in facts["sources"])


# --- mixtures -------------------------------------------------------------------------------------------------------


def letters(corpus: Corpus) -> list[tuple[str, int]]:
    """(letter, tokens) of each document."""
    return [(chr(bytes_tokenizer().decode(tokens[1:])[0].encode()[0]), len(tokens)) for tokens in corpus.documents()]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1), (9, 1), (0.01, 0.02)])
def test_every_prefix_of_a_mixture_has_the_proportions(tmp_path: Path, weights: tuple[float, float]) -> None:
    a, b = write(tmp_path / "a.jsonl", "a", 300, 90), write(tmp_path / "b.jsonl", "b", 300, 60)
    corpus = build_corpus(want((source(a, weight=weights[0]), source(b, weight=weights[1]))), tmp_path / "c")
    share = weights[0] / sum(weights)
    counts = {"a": 0, "b": 0}
    for letter, length in letters(corpus):
        counts[letter] += length
        assert abs(counts["a"] - share * sum(counts.values())) <= 91
    assert min(counts.values()) > 0
    # It ends with the first source that does: what follows could not have the proportions.
    ends = {letter: sum(1 for each, _ in letters(corpus) if each == letter) for letter in "ab"}
    files = {"a": a, "b": b}
    alone = {letter: build_corpus(want((source(files[letter]),)), tmp_path / "c").num_documents for letter in "ab"}
    assert any(ends[letter] == alone[letter] for letter in "ab")


@pytest.mark.parametrize("num_tokens", [1, 500, 1999, 3000])
def test_a_smaller_mixture_is_the_beginning_of_a_larger_one(tmp_path: Path, num_tokens: int) -> None:
    parts = sources(tmp_path, "mixture")
    whole, cut = build_corpus(want(parts), tmp_path / "c"), build_corpus(want(parts, num_tokens), tmp_path / "c")
    assert cut.num_tokens == min(num_tokens, whole.num_tokens)
    np.testing.assert_array_equal(cut.tokens, whole.tokens[: cut.num_tokens])


# --- kills ----------------------------------------------------------------------------------------------------------


def kill_at(tokens: int) -> Callable[[int], None]:
    def progress(num_tokens: int) -> None:
        if num_tokens >= tokens:
            raise Killed

    return progress


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("num_tokens", [None, 2500])
@pytest.mark.parametrize("kind", ["plain", "chat", "mixture"])
def test_a_killed_call_goes_on_to_the_same_bytes(tmp_path: Path, kind: str, num_tokens: int | None) -> None:
    wanted = want(sources(tmp_path, kind), num_tokens)
    build_corpus(wanted, tmp_path / "whole")
    expected = content_of(tmp_path / "whole")
    for place in (1, SHARD - 1, SHARD, SHARD + 60, 2000, 2400):
        directory = tmp_path / f"killed-{place}"
        with pytest.raises(Killed):
            build_corpus(wanted, directory, progress=kill_at(place))
        said: list[str] = []
        build_corpus(wanted, directory, report=said.append)
        assert content_of(directory) == expected
        assert bool(said) or place < 2000


@pytest.mark.usefixtures("small_shards")
def test_only_what_was_not_finished_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = want(sources(tmp_path, "plain"))
    total = build_corpus(wanted, tmp_path / "whole").num_documents
    with pytest.raises(Killed):
        build_corpus(wanted, tmp_path / "c", progress=kill_at(2000))
    written: list[int] = []
    build_corpus(wanted, tmp_path / "c", progress=written.append)
    assert 0 < len(written) < total
    assert written[0] > SHARD


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["flip", "remove", "gap"])
def test_a_damaged_shard_is_made_again_with_all_behind_it(tmp_path: Path, damage: str) -> None:
    wanted = want(sources(tmp_path, "plain"))
    build_corpus(wanted, tmp_path / "whole")
    with pytest.raises(Killed):
        build_corpus(wanted, tmp_path / "c", progress=kill_at(3 * SHARD + 200))
    (work,) = (tmp_path / "c").glob(f"{write_corpus.UNFINISHED}*")
    assert len(list(work.glob("shard-*"))) == 3
    target = work / "shard-00001"
    if damage == "flip":
        content = bytearray((target / "tokens.bin").read_bytes())
        content[40] ^= 1
        (target / "tokens.bin").write_bytes(content)
    elif damage == "remove":
        (target / "offsets.bin").unlink()
    else:
        atomic.remove_directory(target)
    build_corpus(wanted, tmp_path / "c")
    assert content_of(tmp_path / "c") == content_of(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_only_what_is_missing_has_to_find_room(tmp_path: Path) -> None:
    wanted = want(sources(tmp_path, "plain"), num_tokens=5 * SHARD)
    whole = write_corpus.bytes_to_write(wanted, tmp_path / "c")
    assert whole == wanted.most_bytes > 0
    with pytest.raises(Killed):
        build_corpus(wanted, tmp_path / "c", progress=kill_at(3 * SHARD + 200))
    assert 0 < write_corpus.bytes_to_write(wanted, tmp_path / "c") <= whole - 3 * SHARD * 4
    build_corpus(wanted, tmp_path / "c")
    assert write_corpus.bytes_to_write(wanted, tmp_path / "c") == 0


@pytest.mark.usefixtures("small_shards")
def test_a_kill_between_the_last_shard_and_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = want(sources(tmp_path, "mixture"))
    build_corpus(wanted, tmp_path / "whole")

    def kill(*arguments: object) -> None:
        raise Killed

    for place in ((write_corpus, "_link_shards"), (atomic, "remove_directory")):
        with monkeypatch.context() as patch:
            patch.setattr(*place, kill)
            with pytest.raises(Killed):
                build_corpus(wanted, tmp_path / "c")
    build_corpus(wanted, tmp_path / "c")
    assert content_of(tmp_path / "c") == content_of(tmp_path / "whole")


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
def test_several_processes_make_the_same_bytes(tmp_path: Path) -> None:
    wanted = want((*sources(tmp_path, "chat"),))
    build_corpus(wanted, tmp_path / "whole")
    with pytest.raises(Killed):
        build_corpus(wanted, tmp_path / "c", num_workers=2, progress=kill_at(SHARD + 300))
    build_corpus(wanted, tmp_path / "c", num_workers=0)
    assert content_of(tmp_path / "c") == content_of(tmp_path / "whole")


def test_an_error_in_a_process_arrives_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n{"text": 7}\n')
    with pytest.raises(DataError, match=r"line 2: column 'text' holds a int, expected text") as caught:
        build_corpus(want((Source(path=str(file)),)), tmp_path / "c", num_workers=1)
    assert str(caught.value.hint).startswith("name the column that holds the text with `text` under data; or pass over")


PROGRAM = """
import os, sys, time
from pathlib import Path
from mohawkify.data.tokenize_workers import encoders
from mohawkify.data.hub import BEGINNING
from mohawkify.data.sources import RawRow
from mohawkify.recipe.schema import Source
from tests.bytes_tokenizer import bytes_tokenizer
if __name__ == "__main__":
    with encoders(2, bytes_tokenizer(), 258) as submit:
        source = Source(path="a.txt")
        for wait in [submit(source, [RawRow("a", "text", BEGINNING)]) for _ in range(2)]:
            wait()
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        print(*children, flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    children = [int(number) for number in parent.stdout.readline().split()]
    assert len(children) >= 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while any(_lives(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- checked once, and again once anything has changed --------------------------------------------------------------


def test_what_was_hashed_is_hashed_again_only_once_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = want(sources(tmp_path, "plain"))
    build_corpus(wanted, tmp_path / "c")
    folder = tmp_path / "c" / wanted.key
    hashed: list[Path] = []
    verify = atomic.verify_directory
    monkeypatch.setattr(atomic, "verify_directory", lambda path: hashed.append(path) or verify(path))
    # So young a corpus is not believed: a change within the same tick of the clock would go unseen.
    checked_facts(folder)
    assert len(hashed) == 1
    monkeypatch.setattr("mohawkify.data.corpus._TICK_NANOSECONDS", 0)
    facts = [checked_facts(folder) for _ in range(3)]
    assert len(hashed) == 2
    assert facts[0] == facts[2]
    tokens = folder / "shard-00000" / "tokens.bin"
    status = tokens.stat()
    content = bytearray(tokens.read_bytes())
    content[9] ^= 1
    tokens.write_bytes(content)
    os.utime(tokens, ns=(status.st_atime_ns, status.st_mtime_ns))  # hides the change from all but the inode's clock
    with pytest.raises(CheckpointError, match=r"tokens\.bin has changed"):
        checked_facts(folder)
    (folder / "more.bin").write_bytes(b"")
    with pytest.raises(CheckpointError):
        checked_facts(folder)


def test_a_damaged_note_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mohawkify.data.corpus._TICK_NANOSECONDS", 0)
    wanted = want(sources(tmp_path, "plain"))
    build_corpus(wanted, tmp_path / "c")
    note = tmp_path / "c" / f".checked-{wanted.key}.json"
    facts = checked_facts(tmp_path / "c" / wanted.key)
    for content in ("", "[]", "{", '{"manifest.json": [1]}'):
        note.write_text(content)
        assert checked_facts(tmp_path / "c" / wanted.key) == facts
