"""Kept teacher logits: what is written comes back in any order, resumed to the same bytes, and damage is told."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mohawkify.data import teacher_logits
from mohawkify.data.teacher_logits import Layout, TeacherLogits, top_tokens
from mohawkify.errors import CheckpointError, DataError, DiskFullError, TeacherError, UsageError
from mohawkify.files import atomic, disk
from mohawkify.ops.losses import TopK, distill_loss, distill_loss_top_k
from mohawkify.train.second_teacher import require_same_vocabulary
from tests.commands import make_teacher, run, run_well

FACTS = {"teacher": {"name": "t"}, "tokenizer": "a", "text": "b", "temperature": 1.0}
VOCABULARY = {"a": 0, "b": 1}
RECIPE = """
name: final_teacher
description: a recipe whose stage 3 ends on other text
student: {init: attention, state_size: 8}
data:
  train: [{path: "teacher:text.txt"}]
  final_phase: [{path: "teacher:text.txt"}]
  final_phase_epochs: null
stages:
  orient: {tokens: 0, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
  align: {tokens: 0, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
  distill:
    {tokens: 640, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3,
    final_phase: {tokens: 384, sequence_length: 24}}
compute: {precision: fp32, device: cpu, micro_batch_sequences: 2}
evaluation: {tokens: 200, sequence_length: 32, batch_sequences: 2}
checkpoint: {every_steps: 3}
"""


def logits_of(count: int, length: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return 3.0 * torch.randn(count, length, vocabulary, generator=torch.Generator().manual_seed(seed))


def kept(logits: torch.Tensor, top_k: int) -> TopK:
    flat = top_tokens(logits.flatten(0, 1), top_k)
    return TopK(*(tensor.view(*logits.shape[:2], *tensor.shape[1:]) for tensor in flat))


def write(folder: Path, logits: torch.Tensor, top_k: int, per_shard: int = 2) -> TeacherLogits:
    count, length, vocabulary = logits.shape
    folder.mkdir()
    layout = Layout(length, top_k, vocabulary, per_shard)
    made = TeacherLogits.create(folder, layout, FACTS, VOCABULARY, 3 * np.arange(count))
    whole = kept(logits, top_k)
    for number in made.missing():
        part = slice(number * per_shard, (number + 1) * per_shard)
        made.write_shard(number, [TopK(*(tensor[part] for tensor in whole))])
    return TeacherLogits(folder)


@pytest.mark.parametrize(("vocabulary", "top_k", "id_bytes"), [(40, 7, 2), (256, 256, 2), (70_000, 5, 3)])
def test_what_is_written_comes_back_in_any_order(tmp_path, vocabulary, top_k, id_bytes):
    logits = logits_of(5, 9, vocabulary)
    found = write(tmp_path / "logits", logits, top_k)
    assert found.layout.id_bytes == id_bytes
    assert found.layout.bytes_per_token == top_k * (id_bytes + 2) + 4
    size = sum(file.stat().st_size for file in (tmp_path / "logits").glob("shard-*/records.bin"))
    assert size == 5 * 9 * found.layout.bytes_per_token
    expected = kept(logits, top_k)
    order = np.array([12, 0, 9, 9, 3, 6])
    read = found.read(order)
    assert torch.equal(read.ids_blk, expected.ids_blk[order // 3])
    rounding = 2.0**-11 * expected.log_probs_blk[order // 3].abs() + 1e-6
    shift = (read.log_probs_blk - expected.log_probs_blk[order // 3]).abs()
    assert (shift <= rounding + 2e-3).all()
    total = torch.logaddexp(read.log_probs_blk.logsumexp(-1), read.log_rest_bl)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=2e-6, rtol=0)


def test_top_tokens_and_rest_are_exact():
    logits = logits_of(2, 6, 50).double()
    found = kept(logits, 8)
    probabilities = logits.softmax(-1)
    listed, places = probabilities.topk(8, dim=-1)
    assert torch.equal(found.ids_blk, places)
    torch.testing.assert_close(found.log_probs_blk.double(), listed.log(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(found.log_rest_bl.double(), (1 - listed.sum(-1)).log(), atol=1e-4, rtol=1e-5)
    assert (kept(logits, 50).log_rest_bl == -torch.inf).all()


def test_with_the_whole_vocabulary_the_loss_is_the_full_one_to_rounding(tmp_path):
    teacher, student = logits_of(4, 32, 300), logits_of(4, 32, 300, seed=1).requires_grad_()
    counts = torch.rand(4, 32, generator=torch.Generator().manual_seed(2)) < 0.7
    full, full_kl = distill_loss(student, teacher, counts)
    (expected,) = torch.autograd.grad(full, student)
    read = write(tmp_path / "logits", teacher, 300).read(3 * np.arange(4))
    loss, kl = distill_loss_top_k(student, read, counts)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, full, atol=0, rtol=2e-4)
    torch.testing.assert_close(kl, full_kl, atol=0, rtol=2e-4)
    assert (gradient - expected).norm() < 5e-4 * expected.norm()


def test_damaged_or_foreign_logits_are_refused(tmp_path):
    folder = tmp_path / "logits"
    write(folder, logits_of(5, 9, 40), 7)
    records = folder / "shard-000001" / "records.bin"
    data = bytearray(records.read_bytes())
    data[100] ^= 1
    records.write_bytes(data)
    found = TeacherLogits(folder)
    assert found.read(np.array([0, 3])).ids_blk.shape == (2, 9, 7)
    with pytest.raises(DataError, match=r"shard-000001/records.bin has changed"):
        found.read(np.array([0, 6]))
    with pytest.raises(DataError, match="no teacher logits for sequence 4"):
        found.read(np.array([0, 4]))
    atomic.remove_directory(folder / "shard-000001")
    with pytest.raises(DataError, match="lacks 1 of 3 shards"):
        found.require_complete()
    other = write(tmp_path / "other", logits_of(6, 9, 40), 7)
    os.rename(tmp_path / "other" / "shard-000001", folder / "shard-000001")
    with pytest.raises(DataError, match="belongs to other teacher logits"):
        found.read(np.array([6]))
    with pytest.raises(DataError, match="holds no teacher logits"):
        TeacherLogits(tmp_path)
    layout = Layout(9, 6, 40, 2)
    with pytest.raises(UsageError, match="another top_k"):
        TeacherLogits.create(other.folder, layout, FACTS, VOCABULARY, other.sequences)


def test_a_shard_that_fails_half_way_leaves_nothing(tmp_path):
    found = write(tmp_path / "logits", logits_of(4, 9, 40), 7)
    atomic.remove_directory(found.folder / "shard-000000")

    def parts():
        yield kept(logits_of(1, 9, 40), 7)
        raise CheckpointError("the power fails")

    with pytest.raises(CheckpointError):
        found.write_shard(0, parts())
    assert found.missing() == [0]
    assert [path.name for path in found.folder.glob(".tmp*")] == []


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({"a": 0, "b": 1}, {"a": 0, "c": 1}, "id 1 is 'b' in x and is 'c' in y"),
        ({"a": 0, "b": 1}, {"a": 0}, "id 1 is 'b' in x and has no token in y"),
        ({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 2, "c": 1}, "id 1 is 'b' in x and is 'c' in y"),
    ],
)
def test_another_vocabulary_is_refused_with_its_first_token(first, second, says):
    with pytest.raises(TeacherError, match=says):
        require_same_vocabulary(first, second, ("x", "y"))
    require_same_vocabulary(first, dict(reversed(first.items())), ("x", "y"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teach") / "teacher")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "final_teacher.yaml"
    file.write_text(RECIPE)
    return file


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and "corpora" not in path.parts
    }


def test_teach_killed_at_any_time_continues_to_the_same_bytes(teacher, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_logits, "SHARD_BYTES", 2000)
    arguments = ["cache-logits", str(teacher), "--recipe", str(recipe), "--top-k", "9", "--output"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_well(*arguments, whole)
    num_shards = len(list(whole.glob("shard-*")))
    assert num_shards > 4
    script = f"""
from mohawkify.data import teacher_logits
teacher_logits.SHARD_BYTES = 2000
from mohawkify.cli.main import main
main({[*arguments, str(killed)]!r})
"""
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) as child:
        while child.poll() is None and not list(killed.glob("shard-*")):
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert 0 < len(list(killed.glob("shard-*"))) < num_shards
    (killed / f".tmp-shard-000099-{child.pid}").mkdir()  # as a kill within a shard leaves it
    again = run_well(*arguments, killed)
    assert "continuing with" in again.stderr
    assert contents(killed) == contents(whole)
    assert not list(killed.glob(".tmp*"))
    assert "already finished" in run_well(*arguments, killed).stderr


def test_teach_says_what_it_takes_before_it_takes_it(teacher, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda directory: 10_000)
    result = run("cache-logits", teacher, "--recipe", recipe, "--output", tmp_path / "logits")
    assert result.exit_code == DiskFullError.exit_code
    assert "10,000 are free" in result.stderr
    assert not list((tmp_path / "logits").glob("shard-*"))
    once = ("--set", "data.final_phase_epochs=1", "--set", "stages.distill.tokens=100k")
    once += ("--set", "stages.distill.final_phase.tokens=50k")
    result = run("cache-logits", teacher, "--recipe", recipe, "--output", tmp_path / "large", *once)
    assert result.exit_code == DiskFullError.exit_code
    assert not (tmp_path / "large" / "corpora").exists(), "refused before any text is read"


def test_only_the_text_of_the_phase_is_read(teacher, recipe, tmp_path):
    missing = ("--set", "data.train=[{path: nowhere.txt}]")
    run_well("cache-logits", teacher, "--recipe", recipe, "--output", tmp_path / "logits", *missing)
    assert len([path for path in (tmp_path / "logits" / "corpora").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--top-k", "259"), "found --top-k 259, expected at least 1 and at most the vocabulary, 258"),
        (("--set", "stages.distill.final_phase=null"), "has no steps on final_phase text"),
    ],
)
def test_what_cannot_be_taught_is_refused(teacher, recipe, tmp_path, arguments, says):
    result = run("cache-logits", teacher, "--recipe", recipe, "--output", tmp_path / "logits", *arguments)
    assert result.exit_code == UsageError.exit_code
    assert says in result.stderr


def test_the_text_is_that_of_the_teacher_that_is_converted(teacher, recipe, tmp_path):
    larger = make_teacher(tmp_path / "larger", vocab_size=264, hidden_size=48)
    done = run_well(
        "cache-logits",
        larger,
        "--for",
        teacher,
        "--recipe",
        recipe,
        "--output",
        tmp_path / "logits",
        "--stage-phase",
        "train",
    )
    found = TeacherLogits(Path(done.stdout.strip()))
    assert found.layout.vocab_size == 258
    assert found.layout.sequence_length == 16
    assert found.layout.record_bytes < teacher_logits.SHARD_BYTES
