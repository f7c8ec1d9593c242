"""The whole method on a tiny teacher: convert, stop anywhere, continue to the same bits; refuse what does not fit."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mohawkify.data.prepare_text import prepare_text
from mohawkify.data.stage_text import tokens_needed
from mohawkify.distributed.shutdown import Interrupted
from mohawkify.errors import CheckpointError, DataError, DiskFullError, RecipeError, UsageError
from mohawkify.files import disk
from mohawkify.files.atomic import read_json, read_lines
from mohawkify.files.lock import run_lock
from mohawkify.planning.planning import plan
from mohawkify.recipe.loading import apply_overrides, dump_recipe, parse_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.student.save import load_student
from mohawkify.teacher.load import load_teacher
from mohawkify.teacher.resolve import ResolvedTeacher, resolve_teacher
from mohawkify.train import preparation
from mohawkify.train.conversion import ConvertOptions
from mohawkify.train.progress import StageProgress
from mohawkify.train.trainer import convert
from tests.tiny import save_teacher, tiny_teacher

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
RECIPE = """
name: tiny
description: a few steps of every stage
student: {init: attention, state_size: 8}
data:
  train: [{path: "teacher:text.jsonl"}]
stages:
  orient: {tokens: 256, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
  align: {tokens: 320, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
  distill: {tokens: 384, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
compute: {precision: fp32, device: cpu, micro_batch_sequences: 2}
evaluation: {tokens: 200, sequence_length: 32, batch_sequences: 2}
checkpoint: {every_steps: 2, keep: 2}
"""
STEPS = {"orient": 4, "align": 5, "distill": 6}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    """A tiny random Llama with a tokenizer and text beside it."""
    folder = save_teacher(tiny_teacher("llama"), tmp_path_factory.mktemp("teacher") / "tiny-llama")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    order = torch.Generator().manual_seed(3)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(80):
            picks = torch.randint(0, len(WORDS), (int(torch.randint(5, 40, (), generator=order)),), generator=order)
            file.write(json.dumps({"text": " ".join(WORDS[i] for i in picks)}) + "\n")
    return folder


@pytest.fixture
def recipe() -> Recipe:
    return parse_recipe(RECIPE, "tiny.yaml")


@pytest.fixture(scope="module")
def whole_run(teacher_folder, tmp_path_factory):
    """A conversion that nothing disturbed."""
    output = tmp_path_factory.mktemp("run") / "whole"
    return convert(str(teacher_folder), parse_recipe(RECIPE, "tiny.yaml"), ConvertOptions(output=output))


def test_a_run_holds_what_it_promises(whole_run):
    names = {entry.name for entry in whole_run.path.iterdir()}
    promised = "recipe.yaml plan.json teacher.json student.json metrics.jsonl checkpoints final results.json"
    assert names >= set(promised.split())
    results = whole_run.results()
    assert results["teacher"]["perplexity"] > 1
    assert list(results["stages"]) == ["init", "orient", "align", "distill"]
    for name, row in results["stages"].items():
        assert {"tokens", "perplexity", "kl", "top1", "seconds"} <= row.keys(), name
    assert [row["tokens"] for row in results["stages"].values()] == [0, 256, 576, 960]
    steps = [(line["stage"], line["step"]) for line in read_lines(whole_run.metrics_file)]
    assert steps == [(stage, step + 1) for stage, count in STEPS.items() for step in range(count)]
    assert whole_run.recipe() == parse_recipe(RECIPE, "tiny.yaml")


def test_measuring_within_stages_changes_nothing_else(teacher_folder, recipe, whole_run, tmp_path, monkeypatch):
    """Stopped and continued, a stage is measured at its beginning and every other step; its training stays the same."""
    watched = apply_overrides(recipe, ["evaluation.every_tokens=128"])
    stop_at_updates(monkeypatch, (7,))
    said: list[str] = []
    with pytest.raises(Interrupted):
        convert(str(teacher_folder), watched, ConvertOptions(output=tmp_path / "run", report=said.append))
    run = convert(str(teacher_folder), watched, ConvertOptions(output=tmp_path / "run", report=said.append))
    ours, theirs = load_file(run.final / "model.safetensors"), load_file(whole_run.final / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    within = [line for line in read_lines(run.metrics_file) if "held_out" in line]
    places = [("orient", 0), ("orient", 2), ("align", 0), ("align", 2), ("align", 4), ("distill", 0)]
    places += [("distill", 1), ("distill", 3), ("distill", 5)]  # steps at multiples of 128 tokens of the run
    assert [(line["stage"], line["step"]) for line in within] == places
    # Tokens are fewer than 4k: at a stage's beginning it is the measurement after the stage before.
    kl = {name: row["kl"] for name, row in whole_run.results()["stages"].items()}
    begins = {line["stage"]: line["held_out"]["kl"] for line in within if line["step"] == 0}
    assert begins == {"orient": kl["init"], "align": kl["orient"], "distill": kl["align"]}


def test_a_stage_that_makes_the_student_worse_is_reported_while_it_runs(teacher_folder, recipe, tmp_path):
    said: list[str] = []
    wild = apply_overrides(recipe, ["evaluation.every_tokens=64", "stages.distill.learning_rate=1.0"])
    convert(str(teacher_folder), wild, ConvertOptions(output=tmp_path / "run", report=said.append))
    assert any(line.startswith("stage distill has made the student worse so far: KL") for line in said)


def test_training_brings_the_student_nearer(whole_run):
    stages = whole_run.results()["stages"]
    assert stages["distill"]["kl"] < stages["init"]["kl"]


def stop_at_updates(monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]) -> None:
    """Send SIGTERM at these updates of progress, counted over all runs."""
    remaining, count, update = list(stops), 0, StageProgress.update

    def update_and_stop(self: StageProgress, report: Any) -> None:
        nonlocal count
        count += 1
        update(self, report)
        if remaining and count == remaining[0]:
            remaining.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StageProgress, "update", update_and_stop)


@pytest.mark.parametrize("stops", [(1,), (3, 4), (4, 9), (6, 7, 8), (14,)], ids=str)
def test_a_stopped_run_continues_to_the_same_bits(teacher_folder, recipe, whole_run, tmp_path, monkeypatch, stops):
    stop_at_updates(monkeypatch, stops)
    for _ in stops:
        with pytest.raises(Interrupted) as stopped:
            convert(str(teacher_folder), recipe, ConvertOptions(output=tmp_path / "run"))
        assert stopped.value.exit_code == 143
        assert not any(thread.name.startswith("batches") for thread in threading.enumerate())
    run = convert(str(teacher_folder), recipe, ConvertOptions(output=tmp_path / "run"))
    ours, theirs = load_file(run.final / "model.safetensors"), load_file(whole_run.final / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[line["loss"] for line in read_lines(each.metrics_file)] for each in (run, whole_run)]
    assert losses[0] == losses[1]
    for name, row in whole_run.results()["stages"].items():
        assert run.results()["stages"][name]["kl"] == row["kl"]


@pytest.mark.parametrize("stops", [(1, 7, 8), pytest.param((6, 9), marks=pytest.mark.full)], ids=str)
def test_a_calibrated_run_continues_to_the_same_bits(teacher_folder, recipe, tmp_path, monkeypatch, stops):
    """Stopped in the first pass, at the end of the last one, and in the first step of the next stage."""
    calibrated = apply_overrides(
        recipe,
        ["student.init=calibrated", "stages.calibrate={tokens: 256, sequence_length: 16}", "stages.align.tokens=0"],
    )
    whole = convert(str(teacher_folder), calibrated, ConvertOptions(output=tmp_path / "whole"))
    stages = whole.results()["stages"]
    assert list(stages) == ["init", "calibrate", "orient", "distill"]
    assert stages["calibrate"]["kl"] < stages["init"]["kl"]
    stop_at_updates(monkeypatch, stops)
    for _ in stops:
        with pytest.raises(Interrupted):
            convert(str(teacher_folder), calibrated, ConvertOptions(output=tmp_path / "run"))
    run = convert(str(teacher_folder), calibrated, ConvertOptions(output=tmp_path / "run"))
    ours, theirs = load_file(run.final / "model.safetensors"), load_file(whole.final / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [[line["loss"] for line in read_lines(each.metrics_file)] for each in (run, whole)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["stages.calibrate={tokens: 256}"], "stages.calibrate: found beside student.init: attention"),
        (["student.init=calibrated", "stages.calibrate={tokens: 0}"], "stages.calibrate.tokens: found 0"),
    ],
)
def test_a_calibrated_start_and_its_stage_belong_together(recipe, overrides, found):
    with pytest.raises(RecipeError, match=found):
        apply_overrides(recipe, overrides)


NO_INIT = RECIPE.replace("init: attention, ", "")


def test_a_recipe_begins_calibrated_unless_it_says_otherwise():
    recipe = parse_recipe(NO_INIT, "tiny.yaml")
    blocks = recipe.stages.blocks()
    assert (recipe.student.start, list(blocks)) == ("calibrated", ["calibrate", *STEPS])
    # Sequences that can be cut out of those of the other stages, in batches that as many processes can share.
    assert (blocks["calibrate"].sequence_length, blocks["calibrate"].batch_sequences) == (16, 4)
    assert parse_recipe(dump_recipe(recipe), "dumped.yaml") == recipe
    assert list(parse_recipe(RECIPE, "tiny.yaml").stages.blocks()) == [*STEPS]


@pytest.mark.parametrize(
    "option",
    [
        *("mixer=mamba2", "mixer=discrete_mamba2 conv_activation=silu", "gated_norm=true", "decay_bias=false"),
        *("init=attention", "init=identity"),
    ],
)
def test_another_start_or_a_mixer_without_a_calibrated_one_needs_no_stage(option: str) -> None:
    overrides = [f"student.{each}" for each in option.split()]
    chosen = apply_overrides(parse_recipe(NO_INIT, "tiny.yaml"), overrides)
    assert chosen.student.start == ("identity" if "identity" in option else "attention")
    assert list(chosen.stages.blocks()) == [*STEPS]
    again = apply_overrides(chosen, ["student.init=calibrated"])
    assert list(again.stages.blocks()) == ["calibrate", *STEPS]


def test_mixers_that_cannot_be_calibrated_are_refused(teacher_folder, recipe, tmp_path):
    overrides = ["student.init=calibrated", "student.mixer=mamba2", "stages.calibrate={tokens: 256}"]
    with pytest.raises(RecipeError, match=r"found calibrated, which needs student\.conv_activation: none"):
        convert(str(teacher_folder), apply_overrides(recipe, overrides), ConvertOptions(output=tmp_path / "run"))


def test_a_damaged_checkpoint_is_passed_over(teacher_folder, recipe, whole_run, tmp_path, monkeypatch):
    update = StageProgress.update

    def stop_at_eight(self, report):
        update(self, report)
        if report.step == 4 and self.name == "align":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StageProgress, "update", stop_at_eight)
    with pytest.raises(Interrupted) as stopped:
        convert(str(teacher_folder), recipe, ConvertOptions(output=tmp_path / "run"))
    assert stopped.value.exit_code == 130
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] / "model.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-5] ^= 1
    newest.write_bytes(damaged)
    monkeypatch.setattr(StageProgress, "update", update)
    lines: list[str] = []
    run = convert(str(teacher_folder), recipe, ConvertOptions(output=tmp_path / "run", report=lines.append))
    assert any("model.safetensors" in line for line in lines)
    ours, theirs = load_file(run.final / "model.safetensors"), load_file(whole_run.final / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_run_is_left_alone(teacher_folder, recipe, whole_run):
    before = whole_run.results_file.read_bytes()
    lines: list[str] = []
    convert(str(teacher_folder), recipe, ConvertOptions(output=whole_run.path, report=lines.append))
    assert "already finished" in lines[-1]
    assert whole_run.results_file.read_bytes() == before


def test_another_recipe_or_teacher_or_folder_is_refused(teacher_folder, recipe, whole_run, tmp_path):
    other = apply_overrides(recipe, ["seed=1"])
    with pytest.raises(UsageError, match="another recipe"):
        convert(str(teacher_folder), other, ConvertOptions(output=whole_run.path))
    with pytest.raises(UsageError, match="already holds a run"):
        convert(str(teacher_folder), recipe, ConvertOptions(output=whole_run.path, resume="never"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    with pytest.raises(UsageError, match="is not empty"):
        convert(str(teacher_folder), recipe, ConvertOptions(output=tmp_path / "mine"))
    assert [entry.name for entry in (tmp_path / "mine").iterdir() if not entry.name.startswith(".")] == ["thesis.txt"]


def test_plan_counts_what_training_does(teacher_folder, recipe, whole_run):
    planned = plan(str(teacher_folder), recipe)
    assert {name: row["steps"] for name, row in planned["stages"].items()} == STEPS
    assert planned["tokens"] == 960
    final = load_file(whole_run.final / "model.safetensors")
    assert planned["student"]["num_parameters"] == sum(tensor.numel() for tensor in final.values())


def test_a_skipped_stage_is_skipped(teacher_folder, recipe, tmp_path):
    short = apply_overrides(recipe, ["stages.orient.tokens=0", "stages.align.tokens=0", "stages.distill.tokens=64"])
    run = convert(str(teacher_folder), short, ConvertOptions(output=tmp_path / "run"))
    assert list(run.results()["stages"]) == ["init", "distill"]


def test_a_run_that_never_began_leaves_no_folder(teacher_folder, recipe, tmp_path):
    wrong = apply_overrides(recipe, ["data.train.0.path=teacher:missing.jsonl"])
    with pytest.raises(DataError):
        convert(str(teacher_folder), wrong, ConvertOptions(output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_before_the_teacher_is_read(teacher_folder, recipe, tmp_path, monkeypatch):
    for owner, name in (
        (ResolvedTeacher, "fetch"),
        (ResolvedTeacher, "tensors"),
        (preparation, "find_final_teacher"),
        (preparation, "final_teacher_hashes"),
    ):
        monkeypatch.setattr(owner, name, lambda *args: pytest.fail("it takes minutes, and the folder is in use"))
    with run_lock(tmp_path / "run"), pytest.raises(UsageError, match="another process"):
        convert(str(teacher_folder), recipe, ConvertOptions(output=tmp_path / "run"))


class Begun(Exception):
    """The run would go on from here."""


def begin(*args: object, **kwargs: object) -> None:
    raise Begun


def test_a_run_that_the_disk_cannot_hold_is_refused(teacher_folder, recipe, whole_run, tmp_path, monkeypatch):
    expected = read_json(whole_run.plan_file)["disk_bytes"]
    kept = expected["checkpoints"] + expected["final"]
    text = 4 * (tokens_needed(recipe, "train") + recipe.evaluation.tokens)
    prepare_text(str(teacher_folder), recipe, tmp_path / "prepared", num_workers=0, report=lambda line: None)

    def start(free: int, **more: Any) -> None:
        options = {"recipe": recipe, "output": tmp_path / "run", **more}
        monkeypatch.setattr(disk, "free_bytes", lambda directory: free)
        convert(str(teacher_folder), options.pop("recipe"), ConvertOptions(**options))

    with pytest.raises(DiskFullError, match=f"needs {kept + text:,} bytes, {kept + text - 1:,} are free"):
        start(kept + text - 1)
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "load_teacher", begin)
        with pytest.raises(Begun):
            start(kept + text)
        # Text that was tokenised before takes nothing, and how much there is of one that may be short, nobody knows.
        unlimited = apply_overrides(recipe, ["data.epochs=null"])
        for more in ({"prepared": tmp_path / "prepared"}, {"recipe": unlimited, "output": tmp_path / "unlimited"}):
            with pytest.raises(DiskFullError, match=f"needs {kept:,} bytes, {kept - 1:,} are free"):
                start(kept - 1, **more)
            with pytest.raises(Begun):
                start(kept, **more)
    monkeypatch.setattr(preparation, "use_kernels", begin)
    with pytest.raises(Begun):  # a start that tokenised the text and was killed
        start(kept + text, output=tmp_path / "killed")
    with pytest.raises(Begun):
        start(kept, output=tmp_path / "killed")


def test_a_part_in_which_nothing_would_learn_is_refused_before_a_run_begins(teacher_folder, recipe, tmp_path):
    with pytest.raises(RecipeError, match="this teacher's head is its embedding"):
        convert(
            str(teacher_folder),
            apply_overrides(recipe, ["stages.distill.train=[mixer, head]"]),
            ConvertOptions(output=tmp_path / "run"),
        )
    assert not (tmp_path / "run").exists()


def test_a_setting_that_one_process_does_not_heed_is_named(teacher_folder, recipe, tmp_path):
    lines: list[str] = []
    several = apply_overrides(recipe, ["compute.zero=2"])
    convert(str(teacher_folder), several, ConvertOptions(output=tmp_path / "run", report=lines.append))
    assert [line for line in lines if "has no effect" in line] == [
        "compute.zero 2 has no effect on the engine single, which --engine auto chose here"
    ]


def test_text_that_changed_while_the_run_was_stopped_is_refused(teacher_folder, recipe, tmp_path, monkeypatch):
    text = tmp_path / "own.jsonl"
    text.write_bytes((teacher_folder / "text.jsonl").read_bytes())
    own = apply_overrides(recipe, [f"data.train.0.path={text}"])
    update = StageProgress.update
    monkeypatch.setattr(
        StageProgress, "update", lambda self, report: (update(self, report), os.kill(os.getpid(), signal.SIGTERM))
    )
    with pytest.raises(Interrupted):
        convert(str(teacher_folder), own, ConvertOptions(output=tmp_path / "run"))
    monkeypatch.setattr(StageProgress, "update", update)
    text.write_text(text.read_text().replace("one", "two"))
    with pytest.raises(CheckpointError, match="other text"):
        convert(str(teacher_folder), own, ConvertOptions(output=tmp_path / "run"))


def test_text_shorter_than_a_sequence_is_refused_before_anything_is_measured(teacher_folder, recipe, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    short = apply_overrides(recipe, [f"data.train.0.path={tmp_path / 'short.jsonl'}"])
    with pytest.raises(DataError, match="expected at least one sequence of 16"):
        convert(str(teacher_folder), short, ConvertOptions(output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("final", ["best", "last"])
def test_a_rate_far_too_high_is_said_and_the_better_student_kept(teacher_folder, recipe, tmp_path, seed, final):
    lines: list[str] = []
    overrides = ["stages.distill.learning_rate=3.0", f"checkpoint.final={final}", "checkpoint.keep=1", f"seed={seed}"]
    options = ConvertOptions(output=tmp_path / "run", report=lines.append)
    run = convert(str(teacher_folder), apply_overrides(recipe, overrides), options)
    results = run.results()
    align, distill = (results["stages"][name]["kl"] for name in ("align", "distill"))
    assert distill > align
    assert any("stage distill made the student worse" in line for line in lines)
    assert any("in the first tenth of stage distill the loss rose" in line for line in lines)
    assert results["student"]["kl"] == (align if final == "best" else distill)
    resolved, student = resolve_teacher(str(teacher_folder)), load_student(run.final)
    teacher = load_teacher(resolved, dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(4, 12).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = (model(ids).logits.log_softmax(-1) for model in (student, teacher))
    kl = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert (kl < (align + distill) / 2) == (final == "best")
