"""Run a teacher once over a recipe's text, and cache its likeliest next tokens on the disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from mohawkify.data.corpus import Corpus
from mohawkify.data.loader import sequences_of
from mohawkify.data.packing import packed_batch
from mohawkify.data.stage_text import TextReader, epochs_of, sample_range_of, tokens_needed
from mohawkify.data.teacher_logits import Layout, TeacherLogits, top_tokens
from mohawkify.data.tokenize import tokenizer_hash
from mohawkify.distributed.process_group import World
from mohawkify.distributed.shutdown import Shutdown
from mohawkify.errors import UsageError
from mohawkify.files import atomic, disk
from mohawkify.files.lock import run_lock
from mohawkify.objectives.objective import model_inputs
from mohawkify.ops.chunked_kl import head_logits
from mohawkify.ops.losses import TopK
from mohawkify.recipe.schema import Recipe, Segment
from mohawkify.teacher.lm_head import run_to_lm_head
from mohawkify.train.second_teacher import SecondTeacher, find_teacher, require_same_vocabulary, tokenizer_note

Report = Callable[[str], None]

SECONDS_BETWEEN_LINES = 10.0
TOKENS_AT_ONCE = 512  # of which the logits are in memory, in float32
VOCABULARY_BYTES = 64  # for a token with its id in about/vocabulary.json, rarely more


@dataclass(frozen=True)
class Task:
    """The text that a teacher reads.

    Args:
        corpus: the text.
        sequence_length: tokens per sequence.
        sequences: (n,) their numbers, sorted.
        batch_sequences: sequences per forward pass.
    """

    corpus: Corpus
    sequence_length: int
    sequences: np.ndarray
    batch_sequences: int


@dataclass(frozen=True)
class CacheOptions:
    """The part of a teacher's logits that is cached, and the way.

    Args:
        output: the folder of logits; one that was begun is continued.
        phase: ``final_phase`` or ``train``.
        for_source: the teacher that is converted, whose tokenizer cuts the text; None for the teacher itself.
        top_k: tokens per position.
        bits: 8 or 4 to load the teacher's weights in so many bits.
        prepared: folder in which `mohawkify data prepare` wrote tokenised text.
        report: receives a line for every step of the way.
    """

    output: Path
    phase: str = "final_phase"
    for_source: str | None = None
    top_k: int = 64
    bits: int | None = None
    prepared: Path | None = None
    report: Report = print


@dataclass(frozen=True)
class _Job:
    """The teacher, its task and what it runs on."""

    recipe: Recipe
    output: Path
    report: Report
    device: torch.device
    world: World
    first: SecondTeacher
    teacher: SecondTeacher


def cache_logits(
    source: str, recipe: Recipe, options: CacheOptions, device: torch.device, world: World
) -> dict[str, Any]:
    """Write a teacher's logits for a phase of a recipe's stage 3.

    Args:
        source: the teacher: a Hub id or a folder.
        recipe: names text, lengths, order and precision.
        options: the rest.
        device: where the teacher runs.
        world: the processes that share the work, shard by shard.

    Returns:
        A JSON object: ``folder``, ``sequences``, ``tokens``, ``top_k``, ``bytes``, ``bytes_per_token``, ``seconds``.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the same call continues.
        MohawkifyError: anything foreseeable; nothing is left half-written.
    """
    output, report, top_k, for_source = options.output, options.report, options.top_k, options.for_source
    begin = time.monotonic()
    segment = _segment(recipe, options.phase)
    teacher = world.rank0_first(partial(find_teacher, source, options.bits))
    first = teacher if for_source is None else world.rank0_first(partial(find_teacher, for_source, None))
    if first is not teacher:
        names = (first.teacher.name, teacher.teacher.name)
        require_same_vocabulary(first.teacher.tokens, teacher.teacher.tokens, names)
        note = tokenizer_note(first.teacher, teacher.teacher)
        if note:
            report(note)
    teacher.teacher.spec.require_length(f"stages.distill.{segment.length_key}", segment.sequence_length)
    rows = min(first.teacher.spec.vocab_size, teacher.teacher.spec.vocab_size)
    if not 1 <= top_k <= rows:
        raise UsageError(f"found --top-k {top_k}, expected at least 1 and at most the vocabulary, {rows:,}")
    corpora = output / "corpora"
    folder, vocab_size = first.teacher.require_folder(), first.teacher.spec.vocab_size
    text = TextReader(recipe, first.teacher.tokenizer, corpora, folder, vocab_size, options.prepared, report=report)
    text.require_files(segment.data)
    layout = Layout(segment.sequence_length, top_k, rows).with_shards()
    job = _Job(recipe, output, report, device, world, first, teacher)
    with Shutdown() as stop:
        try:
            # The main process alone locks and sweeps; the others wait for it.
            with run_lock(output) if world.is_rank0 else nullcontext():
                if world.is_rank0:
                    atomic.ensure_writable(output)
                    for place in (output, corpora):
                        atomic.sweep_temporaries(place, alone=True)
                    _require_room(text, segment, layout, output)
                report("reading the text")
                task = world.rank0_first(lambda: _task(text, segment))
                logits = world.rank0_first(lambda: _begin(job, task, layout))
                _write_missing(job, logits, task, stop)
                world.barrier()
        except KeyboardInterrupt:
            stop.check("; the shards that are written stay")
            raise
    logits.require_complete()
    tokens = len(logits.sequences) * segment.sequence_length
    return {
        "folder": str(output),
        "sequences": len(logits.sequences),
        "tokens": tokens,
        "top_k": top_k,
        "bytes": tokens * logits.layout.bytes_per_token,
        "bytes_per_token": logits.layout.bytes_per_token,
        "seconds": time.monotonic() - begin,
    }


def _segment(recipe: Recipe, phase: str) -> Segment:
    for segment in recipe.stages.distill.segments():
        if segment.data == phase:
            return segment
    raise UsageError(
        f"stage distill of recipe {recipe.name} has no steps on {phase} text",
        hint="choose the other --stage-phase, or give stages.distill.final_phase tokens and data.final_phase sources",
    )


def _require_room(text: TextReader, segment: Segment, layout: Layout, output: Path) -> None:
    """Refuse, before the text is read, if the disk cannot hold it with its logits, as far as its size is known."""
    recipe, needed = text.recipe, text.bytes_to_write(segment.data)
    if epochs_of(recipe, segment.data) is not None:  # otherwise the text may be short and read many times
        most = segment.num_steps * recipe.stages.distill.batch_sequences
        most = min(most, tokens_needed(recipe, segment.data) // segment.sequence_length)
        needed += max(0, most - _num_written(output, layout)) * layout.record_bytes
    disk.require_space(output, needed)


def _num_written(output: Path, layout: Layout) -> int:
    """About how many sequences lie in a folder already."""
    return sum(1 for _ in output.glob("shard-*")) * layout.shard_sequences


def _task(text: TextReader, segment: Segment) -> Task:
    """The text as the run will read it, and which of its sequences."""
    recipe, distill = text.recipe, text.recipe.stages.distill
    place = [each.data for each in distill.segments()].index(segment.data)
    sample_range = sample_range_of(recipe, "distill", place, text.stage_text(segment.data))
    sequences = sequences_of(sample_range, distill.batch_sequences, recipe.seed)
    micro = recipe.compute.micro_batch_sequences
    return Task(sample_range.corpus, segment.sequence_length, sequences, micro if isinstance(micro, int) else 1)


def _begin(job: _Job, task: Task, layout: Layout) -> TeacherLogits:
    """Estimate the space, and write the facts of the logits, unless an earlier call or process did."""
    output = job.output
    total = len(task.sequences) * layout.record_bytes
    needed = max(0, len(task.sequences) - _num_written(output, layout)) * layout.record_bytes
    job.report(
        f"{len(task.sequences):,} sequences of {task.sequence_length:,} tokens, {layout.bytes_per_token:,} bytes"
        f" per token: {total:,} bytes, {disk.free_bytes(output):,} are free"
    )
    vocabulary = job.first.teacher.tokens
    disk.require_space(output, needed + VOCABULARY_BYTES * len(vocabulary))
    facts = {
        "teacher": job.teacher.facts(),
        "tokenizer": tokenizer_hash(job.first.teacher.tokenizer),
        "text": task.corpus.fingerprint,
        "temperature": 1.0,
        "precision": job.recipe.compute.precision,
    }
    return TeacherLogits.create(output, layout, facts, vocabulary, task.sequences)


def _write_missing(job: _Job, logits: TeacherLogits, task: Task, stop: Shutdown) -> None:
    """Write this process's share of the shards that are not there yet."""
    teacher, device, world, report = job.teacher, job.device, job.world, job.report
    missing = world.on_rank0(logits.missing)  # one list for all: the first process may write before the last one reads
    if not missing:
        report(f"{logits.folder} is already finished")
        return
    if len(missing) < logits.num_shards:
        report(f"continuing with {len(missing):,} of {logits.num_shards:,} shards")
    share = missing[world.rank :: world.size]
    if not share:
        return
    report(f"loading {teacher.teacher.name}" + (f" in {teacher.bits} bits" if teacher.bits else ""))
    is_bf16 = job.recipe.compute.precision == "bf16"
    model = teacher.load(torch.bfloat16 if is_bf16 else torch.float32, device)
    progress = _Progress(sum(len(logits.shard_sequences(number)) for number in share), task.sequence_length, report)
    for number in share:

        def answers(number: int = number) -> Iterator[TopK]:
            sequences = logits.shard_sequences(number)
            for first in range(0, len(sequences), task.batch_sequences):
                stop.check("; the shards that are written stay")
                part = sequences[first : first + task.batch_sequences]
                with torch.autocast(device.type, torch.bfloat16) if is_bf16 else nullcontext():
                    yield _top_tokens(model, teacher, task, part, logits.layout, device)
                progress.advance(len(part))

        logits.write_shard(number, answers())


@torch.no_grad()
def _top_tokens(
    model: PreTrainedModel,
    teacher: SecondTeacher,
    task: Task,
    sequences: np.ndarray,
    layout: Layout,
    device: torch.device,
) -> TopK:
    batch = packed_batch(task.corpus, task.sequence_length, sequences)
    batch = type(batch)(*(tensor.to(device) for tensor in batch))
    inputs = model_inputs(model, batch, teacher.teacher.adapter)
    if teacher.teacher.adapter.logits.unknown is None:
        head = run_to_lm_head(model, teacher.teacher.adapter, **inputs)
        hidden_td = head.hidden_bld.flatten(0, 1)
        chunks = (head_logits(head._replace(hidden_bld=part)) for part in hidden_td.split(TOKENS_AT_ONCE))
    else:
        chunks = iter(model(**inputs).logits.flatten(0, 1).split(TOKENS_AT_ONCE))
    found = [top_tokens(logits_tv[:, : layout.vocab_size], layout.top_k) for logits_tv in chunks]
    ids, log_probs, log_rest = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    shape = batch.input_ids.shape
    return TopK(ids.view(*shape, -1), log_probs.view(*shape, -1), log_rest.view(shape))


class _Progress:
    """A line now and then: sequences done and left, tokens per second, time to the end."""

    def __init__(self, num_sequences: int, sequence_length: int, report: Report) -> None:
        self.num_sequences, self.sequence_length, self.report = num_sequences, sequence_length, report
        self.done = 0
        self.begin = self.shown = time.monotonic()

    def advance(self, count: int) -> None:
        """Count some more sequences."""
        self.done += count
        now = time.monotonic()
        if now - self.shown < SECONDS_BETWEEN_LINES and self.done < self.num_sequences:
            return
        self.shown = now
        rate = self.done / max(now - self.begin, 1e-9)
        self.report(
            f"{self.done / self.num_sequences:4.0%}  {self.done:,} of {self.num_sequences:,} sequences  "
            f"{rate * self.sequence_length:,.0f} tok/s  {(self.num_sequences - self.done) / rate:.0f} s left"
        )
