"""The stream of tokens a run trains on: the same to the digit for any processes, threads and points of resuming."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mohawkify.data import loader
from mohawkify.data.corpus import Corpus, Joined
from mohawkify.data.loader import SampleRange, batch_at, read_batches
from mohawkify.data.packing import Batch
from mohawkify.data.stage_text import epochs_needed, planned_ranges, stage_ranges, tokens_needed
from mohawkify.errors import RecipeError
from mohawkify.recipe.loading import apply_overrides, parse_recipe
from mohawkify.recipe.schema import Recipe

RECIPE = """
name: tiny
description: two lengths, two corpora, several epochs
student: {init: attention}
data:
  train: [{path: a.txt}]
  final_phase: [{path: b.jsonl, chat: talk}]
  epochs: 3
  final_phase_epochs: 4
stages:
  orient: {tokens: 2k, sequence_length: 8, batch_sequences: 8, learning_rate: 1e-3}
  align: {tokens: 3k, sequence_length: 16, batch_sequences: 8, learning_rate: 1e-3}
  distill:
    tokens: 6k
    sequence_length: 16
    batch_sequences: 8
    learning_rate: 1e-3
    final_phase: {tokens: 2.56k, sequence_length: 32}
seed: 5
"""
BATCH = 8
WORLDS, WORKERS = (1, 2, 4), (0, 1, 3)


def corpus(num_tokens: int, seed: int, is_masked: bool) -> Corpus:
    """Scattered tokens in documents of many lengths, in three shards; no library's random numbers, which may change."""
    places = np.arange(num_tokens, dtype=np.uint64)
    tokens = (places * 2_654_435_761 + seed * 40_503) % 2**32
    starts = np.flatnonzero((places * places + seed) % 23 == 1)
    offsets = np.unique([0, *starts, num_tokens]).astype(np.int64)
    completion = (tokens % 3 == 0).astype(np.uint8) if is_masked else None
    return Corpus(Joined(np.array_split(tokens.astype(np.uint32), 3)), offsets, f"{seed}", completion)


def make_corpora(recipe: Recipe) -> dict[str, Corpus]:
    """Exactly the tokens that the epochs need, so that every epoch's border is crossed."""
    return {
        "train": corpus(tokens_needed(recipe, "train"), 1, is_masked=False),
        "final_phase": corpus(tokens_needed(recipe, "final_phase"), 2, is_masked=True),
    }


def make_stretches() -> list[SampleRange]:
    """The last stage: its main part, then its finish."""
    recipe = parse_recipe(RECIPE, "tiny.yaml")
    return stage_ranges(recipe, make_corpora(recipe))["distill"]


def total(ranges: list[SampleRange]) -> int:
    return sum(sample_range.num_steps for sample_range in ranges)


def resume_points(ranges: list[SampleRange]) -> list[int]:
    """Ten steps after which a run stops and continues: at the beginning, around the final phase, at the end."""
    border, end = ranges[0].num_steps, total(ranges)
    return sorted({1, 2, 5, border - 1, border, border + 1, border + 3, end - 1, end, 13})


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_recipe(RECIPE, "tiny.yaml")


@pytest.fixture(scope="module")
def corpora(recipe: Recipe) -> dict[str, Corpus]:
    return make_corpora(recipe)


@pytest.fixture(scope="module")
def ranges() -> list[SampleRange]:
    return make_stretches()


def stream_digest(ranges: list[SampleRange], fields: tuple[str, ...] = Batch._fields) -> str:
    """The hash of the whole stream, batch after batch."""
    digest = hashlib.sha256()
    for step in range(total(ranges)):
        batch = batch_at(ranges, step, BATCH, 5)
        for tensor in (getattr(batch, field) for field in fields):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_the_stream_is_the_same_for_any_processes_threads_and_resumes(ranges: list[SampleRange]) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.data.loader_processes",
    ]  # which forks, as this process with its threads must not
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    digests = json.loads(done.stdout)
    assert len(digests) == len(WORLDS) * len(WORKERS) * (10 + 1)
    assert set(digests.values()) == {stream_digest(ranges)}, digests


def test_the_stream_never_changes(ranges: list[SampleRange]) -> None:
    """A run made with an older version continues with the same text: this number may not change."""
    assert stream_digest(ranges, ("input_ids", "position_ids", "loss_mask"))[:16] == "adcfc5902201cd85"


def test_every_epoch_is_whole(recipe: Recipe, corpora: dict[str, Corpus]) -> None:
    final_phase = stage_ranges(recipe, corpora)["distill"][1]
    rows = [
        tuple(row)
        for step in range(final_phase.num_steps)
        for row in batch_at([final_phase], step, BATCH, 5)[0].tolist()
    ]
    per_epoch = corpora["final_phase"].num_tokens // final_phase.sequence_length
    assert len(rows) == 4 * per_epoch
    epochs = [rows[first : first + per_epoch] for first in range(0, len(rows), per_epoch)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == per_epoch for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_stages_of_different_length_read_every_text_equally_often(recipe: Recipe, corpora: dict[str, Corpus]) -> None:
    reads = np.zeros(corpora["train"].num_tokens, dtype=int)
    for stage in stage_ranges(recipe, corpora).values():
        for step in range(stage[0].num_steps):
            for sequence in batch_at([stage[0]], step, BATCH, 5).sequences.tolist():
                reads[sequence * stage[0].sequence_length :][: stage[0].sequence_length] += 1
    assert sorted(set(reads.tolist())) == [2, 3]
    assert np.count_nonzero(reads == 2) == 16, "the tokens that three epochs have more than the stages read"


def test_lengths_that_share_no_order_are_refused_where_text_is_read_so_often(recipe: Recipe) -> None:
    odd = ["stages.align.sequence_length=12", "stages.distill.final_phase.sequence_length=24"]
    with pytest.raises(RecipeError, match=r"stages.align.sequence_length: found 12 beside 16 on the same text"):
        apply_overrides(recipe, odd)
    allowed = apply_overrides(recipe, [*odd, "data.epochs=null"])
    assert [span.sequences_per_block for found in planned_ranges(allowed).values() for span in found] == [2, 1, 1, 1]


def test_tokens_wanted_are_just_enough(recipe: Recipe) -> None:
    for data, epochs in (("train", 3), ("final_phase", 4)):
        enough = tokens_needed(recipe, data)
        assert epochs_needed(recipe, data, enough) == epochs
        assert epochs_needed(recipe, data, enough - 1) == epochs + 1
    first = {name: [(span.first, span.end) for span in found] for name, found in planned_ranges(recipe).items()}
    assert first == {"orient": [(0, 248)], "align": [(124, 308)], "distill": [(308, 524), (0, 80)]}


def test_batches_are_read_ahead_in_order_and_the_threads_end(
    ranges: list[SampleRange], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def note(ranges: list[SampleRange], step: int, batch_sequences: int, seed: int) -> Batch:
        seen.append(step)
        return batch_at(ranges, step, batch_sequences, seed)

    monkeypatch.setattr(loader, "batch_at", note)
    batches = read_batches(ranges, batch_sequences=BATCH, seed=5, first_step=3, num_workers=2)
    next(batches)
    while len(seen) < 5:
        threading.Event().wait(0.001)
    assert sorted(seen) == [3, 4, 5, 6, 7]
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_an_error_in_a_thread_arrives(ranges: list[SampleRange], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Batch:
        raise OSError("the disk is gone")

    monkeypatch.setattr(loader, "batch_at", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        next(read_batches(ranges, batch_sequences=BATCH, seed=5, first_step=0, num_workers=2))


def test_joined_parts_read_as_one(tmp_path: Path) -> None:
    whole = np.arange(100, 130, dtype=np.uint32)
    for cuts in ([], [10], [1, 2, 29], [7, 14, 21]):
        joined = Joined(np.split(whole, cuts))
        assert len(joined) == 30
        np.testing.assert_array_equal(np.asarray(joined), whole)
        for start, end in [(0, 30), (3, 3), (0, 1), (6, 22), (29, 30), (0, 0), (30, 30)]:
            np.testing.assert_array_equal(np.asarray(joined[start:end]), whole[start:end])
            np.testing.assert_array_equal(np.asarray(joined[start:][: end - start]), whole[start:end])
        places = np.random.default_rng(0).integers(0, 30, (4, 9))
        np.testing.assert_array_equal(joined[places], whole[places])
