"""Tokenised text and kept teacher logits of a stranger: as many tokens as promised, or one clear error."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch

from mohawkify.data import write_corpus
from mohawkify.data.corpus import load_corpus, read_note
from mohawkify.data.prepare_text import inspect_text
from mohawkify.data.teacher_logits import Layout, TeacherLogits, top_tokens
from mohawkify.data.write_corpus import CorpusRequest, build_corpus
from mohawkify.errors import MohawkifyError
from mohawkify.files import atomic
from mohawkify.files.manifest import sealed
from mohawkify.ops.losses import TopK
from mohawkify.recipe.schema import Source
from tests.bytes_tokenizer import bytes_tokenizer
from tests.files.faults import content_of
from tests.fuzz.campaign import require_message, run_campaign
from tests.fuzz.folders import changed, decode, encode, inside
from tests.fuzz.mutate import PATHS, mutate_bytes, mutate_json, render

VOCABULARY = 258
NOTE = "corpora/note.json"
TEXT, LOGITS = "corpora/text", "logits"
MANIFEST = atomic.MANIFEST_NAME
ODD_NUMBERS = (-(2**63), -5, -1, 0, 1, 3, 257, 258, 2**31, 2**32 - 1, 2**62, 2**63 - 1)


def make(root: Path) -> None:
    """Text of two shards with completions, a note that leads there, and the logits of four sequences."""
    talk = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello yourself."}]
    (root / "rows.jsonl").write_text("".join(json.dumps({"talk": talk * (1 + i % 3)}) + "\n" for i in range(12)))
    tokenizer = bytes_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    source = Source.model_validate({"path": str(root / "rows.jsonl"), "chat": "talk"})
    wanted = CorpusRequest((source,), tokenizer, None, None, VOCABULARY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_corpus, "_SHARD_TOKENS", 300)
        corpus = build_corpus(wanted, root / "corpora")
    (root / "corpora" / wanted.key).rename(root / TEXT)
    atomic.write_json(root / NOTE, {"folder": str(root / TEXT), "fingerprint": corpus.fingerprint})
    facts = {"teacher": {"name": "t"}, "tokenizer": "a", "text": "b", "temperature": 1.0}
    (root / LOGITS).mkdir()
    logits = TeacherLogits.create(root / LOGITS, Layout(5, 3, 17, 2), facts, {"a": 0, "b": 1}, 3 * np.arange(4))
    torch.manual_seed(0)
    for number in range(2):
        found = top_tokens(torch.randn(10, 17), 3)
        logits.write_shard(number, [TopK(*(part.view(2, 5, *part.shape[1:]) for part in found))])


@cache
def originals() -> dict[str, bytes]:
    """The files of such a folder."""
    folder = Path(mkdtemp())
    try:
        make(folder)
        return {name: data for name, data in content_of(folder).items() if not name.startswith("rows")}
    finally:
        shutil.rmtree(folder)


def draw(rng: Random) -> bytes:
    """One file with other content, mostly under a manifest that fits it."""
    name = rng.choice([name for name in originals() if "/.checked-" not in name])
    data = originals()[name]
    if name == NOTE:
        value = mutate_json(rng, json.loads(data))
        if rng.random() < 0.5:
            value = {"folder": rng.choice(PATHS), "fingerprint": "x"}
        return encode({name: render(value).encode("utf-8", "surrogatepass")}, sealed=False)
    if name.endswith(".json"):
        manifest = json.loads(data)
        if "facts" not in manifest:
            manifest = mutate_json(rng, manifest)
        elif rng.random() < 0.3:
            manifest["facts"] |= {"shards": [rng.choice((*PATHS, "shard-00000", "shard-00001", "../../logits/about"))]}
        else:
            manifest["facts"] = mutate_json(rng, manifest["facts"])
        data = render(manifest).encode("utf-8", "surrogatepass")
    elif rng.random() < 0.5:
        data = mutate_bytes(rng, data)
    else:
        numbers = np.frombuffer(data[: len(data) // 8 * 8], dtype="<i8").copy()
        if len(numbers):
            numbers[rng.randrange(len(numbers))] = rng.choice(ODD_NUMBERS)
        data = numbers.tobytes() + data[len(data) // 8 * 8 :]
    return encode({name: data}, sealed=rng.random() < 0.8)


def seal(root: Path, name: str) -> None:
    """Let the manifests above a file fit it, or itself, as whoever made it up would."""
    folder = (root / name).parent
    if name.endswith(MANIFEST):
        body = json.loads((root / name).read_bytes())
        (root / name).write_bytes(sealed({key: body[key] for key in body if key != "sha256"}, root / name))
        folder = folder.parent
    while (folder / MANIFEST).is_file():
        facts = json.loads((folder / MANIFEST).read_bytes())["facts"]
        (folder / MANIFEST).unlink()
        atomic._write_manifest(folder, facts)
        folder = folder.parent


def read_text(folder: Path) -> int:
    """All tokens of a corpus, as its readers see them."""
    corpus = load_corpus(folder, VOCABULARY)
    documents = list(corpus.documents())
    assert sum(map(len, documents)) == corpus.num_tokens == len(corpus.tokens)
    assert all(len(document) and document.max() < VOCABULARY for document in documents)
    assert corpus.completion is None or len(corpus.completion) == corpus.num_tokens
    (shown,) = inspect_text(folder, None, 2)["corpora"].values()
    assert shown["tokens"] == corpus.num_tokens
    return corpus.num_tokens


def read_logits(root: Path) -> int:
    """All probabilities that are kept."""
    logits = TeacherLogits(root / LOGITS)
    logits.require_complete()
    logits.identity()
    logits.vocabulary()
    found = logits.read(logits.sequences)
    assert found.ids_blk.max() < logits.layout.vocab_size
    assert torch.isfinite(found.log_probs_blk).all()
    return len(logits.sequences)


def read(root: Path, name: str) -> Any:
    if name == NOTE:
        return load_corpus(read_note(root / NOTE)[0], VOCABULARY).num_tokens
    return read_logits(root) if name.startswith(LOGITS) else read_text(root / TEXT)


@pytest.fixture
def root(folder: Path) -> Path:
    make(folder)
    for name in (NOTE, LOGITS, TEXT):
        read(folder, name)  # what is imported once does not count
    return folder


def test_any_token_file(root: Path) -> None:
    files = content_of(root)
    expected = {name: read(root, name) for name in (NOTE, LOGITS, TEXT)}

    def check(case: bytes) -> None:
        changes, facts = decode(case)
        (name,) = changes
        manifests = {each: data for each, data in files.items() if each.endswith(MANIFEST)}
        with changed(root, files, {**manifests, **changes}):
            if facts["sealed"]:
                try:
                    seal(root, name)
                except (ValueError, TypeError, KeyError, RecursionError, MohawkifyError):
                    return  # nothing that could be sealed
            with inside(root, only_written=name == NOTE):
                try:
                    found = read(root, name)
                except MohawkifyError as error:
                    require_message(error)
                    return
        if not facts["sealed"] and name != NOTE:
            assert changes[name] == files[name]
        if name.startswith(TEXT):
            assert found == expected[TEXT]

    run_campaign("token-files", 220, draw, check)
