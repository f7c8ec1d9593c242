"""Text ahead of a conversion: tokenise all of a recipe's, and show what was made."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mohawkify.data.corpus import LARGEST_ID, Corpus, checked_facts, load_corpus, read_note
from mohawkify.data.stage_text import TextReader
from mohawkify.data.tokenize import tokenizer_hash
from mohawkify.errors import MohawkifyError, UsageError
from mohawkify.files import atomic, disk
from mohawkify.files.lock import run_lock
from mohawkify.recipe.schema import Recipe
from mohawkify.teacher.resolve import resolve_teacher

_SHOWN_TOKENS = 80  # of a document
_BEGIN, _END = "⟦", "⟧"  # around completions


def prepare_text(
    source: str, recipe: Recipe, output: Path, *, num_workers: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """Tokenise all text that a conversion would read.

    Args:
        source: the teacher: a Hub id or a folder; of the Hub only configuration and tokenizer are fetched.
        recipe: the resolved recipe.
        output: where each corpus gets a folder of its own.
        num_workers: processes that tokenise; 0 does it here.
        report: receives a line now and then.

    Returns:
        A JSON object: ``directory``, ``seconds`` and ``corpora``, by name the facts of each.

    Raises:
        MohawkifyError: the teacher or the text is missing, damaged or not enough; nothing is left half-written.
    """
    begin = time.perf_counter()
    teacher = resolve_teacher(source, need="tokenizer")
    folder, vocab_size = teacher.require_folder(), teacher.spec.vocab_size
    text = TextReader(recipe, teacher.tokenizer, output, folder, vocab_size, num_workers=num_workers, report=report)
    text.require_files()
    with run_lock(output):
        atomic.ensure_writable(output)
        atomic.sweep_temporaries(output, alone=True)
        wanted = text.requests
        disk.require_space(output, text.bytes_to_write())
        text.training()
        text.held_out()
    corpora = {name: _facts(output / each.key) for name, each in wanted.items()}
    return {"directory": str(output), "seconds": time.perf_counter() - begin, "corpora": corpora}


def inspect_text(folder: Path, teacher: str | None, num_documents: int) -> dict[str, Any]:
    """Show what tokenised text holds.

    Args:
        folder: a corpus, a folder of corpora, or a run.
        teacher: whose tokenizer it is; None for the one it was made with, if that lies in a folder here.
        num_documents: how many documents to show of each corpus.

    Returns:
        A JSON object: ``directory`` and ``corpora``, by folder the facts of each and ``shown``, a list of ``document``,
        ``tokens`` and ``text``; the text is null where the tokenizer is not at hand.

    Raises:
        UsageError: there is no tokenised text, or the tokenizer is another.
        DataError: it is damaged.
    """
    folders = _corpora_in(folder)
    if not folders:
        raise UsageError(
            f"{folder} holds no tokenised text", hint="name what `mohawkify data prepare` wrote, or a run's folder"
        )
    corpora = {}
    for name, path in folders.items():
        facts, corpus = _facts(path), load_corpus(path)
        tokenizer = _tokenizer(facts, teacher)
        numbers = np.linspace(0, corpus.num_documents - 1, min(num_documents, corpus.num_documents)).astype(int)
        corpora[name] = {**facts, "shown": [_show(corpus, int(number), tokenizer) for number in numbers]}
    return {"directory": str(folder), "corpora": corpora}


def _facts(folder: Path) -> dict[str, Any]:
    facts = checked_facts(folder)
    facts.pop(LARGEST_ID)
    return {"folder": str(folder), "bytes": sum(file.stat().st_size for file in folder.rglob("*.bin")), **facts}


def _corpora_in(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}")
    if (folder / atomic.MANIFEST_NAME).is_file():
        return {folder.name: folder}
    inside = folder / "corpora" if (folder / "corpora").is_dir() else folder
    notes = {note.stem: read_note(note)[0] for note in sorted(inside.glob("[!.]*.json"))}
    return notes | {path.name: path for path in sorted(inside.glob("[!.]*")) if (path / atomic.MANIFEST_NAME).is_file()}


def _tokenizer(facts: dict[str, Any], teacher: str | None) -> PreTrainedTokenizerBase | None:
    source = teacher or facts["teacher"]
    if teacher is None and not os.path.isdir(source):
        return None  # a name of the Hub in a stranger's text fetches nothing
    try:
        tokenizer = resolve_teacher(source, need="tokenizer").tokenizer
    except MohawkifyError:
        if teacher is not None:
            raise
        return None  # the teacher is gone; the numbers are worth seeing without it
    if tokenizer_hash(tokenizer) == facts["tokenizer"]:
        return tokenizer
    if teacher is not None:
        raise UsageError(f"{teacher} has another tokenizer than the text's", hint="name the teacher it was for")
    return None


def _show(corpus: Corpus, number: int, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    start, end = (int(corpus.offsets[number + more]) for more in (0, 1))
    shown = slice(start, min(end, start + _SHOWN_TOKENS))
    text = None
    if tokenizer is not None:
        tokens = np.asarray(corpus.tokens[shown])
        flags = np.ones(len(tokens)) if corpus.completion is None else np.asarray(corpus.completion[shown])
        text = ""
        for flag, pairs in groupby(zip(flags.tolist(), tokens.tolist(), strict=True), key=lambda pair: pair[0]):
            part = str(tokenizer.decode([token for _, token in pairs]))
            text += f"{_BEGIN}{part}{_END}" if flag and corpus.completion is not None else part
        text += " ..." if end > shown.stop else ""
    return {"document": number, "tokens": end - start, "text": text}
