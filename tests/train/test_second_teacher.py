"""A second teacher for the end of a run: online, from kept logits, in few bits, stopped and continued, or refused."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mohawkify.distributed.shutdown import Interrupted
from mohawkify.errors import CheckpointError, DataError, TeacherError, UsageError
from mohawkify.files.atomic import read_lines
from mohawkify.recipe.loading import apply_overrides, load_recipe, parse_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.run import checkpoint
from mohawkify.run.folder import RunFolder
from mohawkify.train.conversion import ConvertOptions
from mohawkify.train.progress import StageProgress
from mohawkify.train.second_teacher import SecondTeacher
from mohawkify.train.trainer import convert
from mohawkify.train.training_state import read_training_state
from mohawkify.train.watchdog import Watchdog
from tests.commands import copy_of, make_teacher, run_well
from tests.data.test_teacher_logits import RECIPE
from tests.tiny import tiny_teacher

NUM_TRAIN_STEPS, NUM_FINISH_STEPS = 4, 4
STAGES = ("orient", "align", "distill")


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("first") / "first")


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    """Another model with the same tokens: wider, deeper, and with six rows of padding in its embedding."""
    sizes = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    return make_teacher(tmp_path_factory.mktemp("second") / "second", **sizes)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "final_teacher.yaml"
    file.write_text(RECIPE)
    return file


def with_finish(**keys: object) -> Recipe:
    settings = [f"stages.distill.final_phase.{key}={json.dumps(value)}" for key, value in keys.items()]
    return apply_overrides(parse_recipe(RECIPE, "final_teacher.yaml"), settings)


def start(first: Path, recipe: Recipe, output: Path, lines: list[str] | None = None) -> RunFolder:
    return convert(
        str(first), recipe, ConvertOptions(output=output, report=(lines if lines is not None else []).append)
    )


def metrics(run: RunFolder, name: str = "loss") -> torch.Tensor:
    return torch.tensor([line[name] for line in read_lines(run.metrics_file)])


def same_weights(run: RunFolder, other: RunFolder) -> bool:
    ours, theirs = (load_file(each.final / "model.safetensors") for each in (run, other))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def plain(first, tmp_path_factory) -> RunFolder:
    """A run that its first teacher finishes."""
    return start(first, with_finish(), tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def online(first, second, tmp_path_factory) -> RunFolder:
    return start(first, with_finish(teacher=str(second)), tmp_path_factory.mktemp("online") / "run")


@pytest.fixture(scope="module")
def all_logits(first, second, recipe_file, tmp_path_factory) -> Path:
    """The second teacher's logits of the whole vocabulary."""
    folder = tmp_path_factory.mktemp("logits") / "all"
    run_well("cache-logits", second, "--for", first, "--recipe", recipe_file, "--top-k", "258", "--output", folder)
    return folder


@pytest.fixture(scope="module")
def offline(first, all_logits, tmp_path_factory) -> RunFolder:
    return start(first, with_finish(logits=str(all_logits)), tmp_path_factory.mktemp("offline") / "run")


def test_only_the_end_of_the_run_is_taught_by_the_other(plain, online):
    assert torch.equal(metrics(plain)[:NUM_TRAIN_STEPS], metrics(online)[:NUM_TRAIN_STEPS])
    difference = (metrics(plain, "kl") - metrics(online, "kl")).abs()[NUM_TRAIN_STEPS:]
    assert len(difference) == NUM_FINISH_STEPS
    assert (difference > 0.05).all()


def test_measurements_compare_with_the_first_teacher(plain, online, offline):
    ours = plain.results()
    for run in (online, offline):
        assert run.results()["teacher"] == ours["teacher"]
        assert run.results()["stages"]["init"]["kl"] == ours["stages"]["init"]["kl"]
        assert run.results()["stages"]["distill"]["kl"] != ours["stages"]["distill"]["kl"]


def test_kept_logits_of_the_whole_vocabulary_teach_what_the_teacher_teaches(online, offline):
    torch.testing.assert_close(metrics(offline), metrics(online), rtol=5e-4, atol=0)
    torch.testing.assert_close(metrics(offline, "kl"), metrics(online, "kl"), rtol=2e-3, atol=0)
    kl = [run.results()["stages"]["distill"]["kl"] for run in (online, offline)]
    assert kl[1] == pytest.approx(kl[0], rel=1e-3)


def test_a_few_kept_tokens_give_a_lower_bound_of_the_divergence(first, second, recipe_file, online, tmp_path):
    run_well(
        "cache-logits", second, "--for", first, "--recipe", recipe_file, "--top-k", "8", "--output", tmp_path / "logits"
    )
    run = start(first, with_finish(logits=str(tmp_path / "logits")), tmp_path / "run")
    first_step = slice(NUM_TRAIN_STEPS, NUM_TRAIN_STEPS + 1)
    few, whole = metrics(run, "kl")[first_step], metrics(online, "kl")[first_step]
    assert 0 < float(few) < float(whole)


@pytest.mark.parametrize("kind", ["online", "offline"])
def test_a_run_stopped_while_it_is_finished_continues_to_the_same_bits(
    kind, first, second, all_logits, tmp_path, monkeypatch, request
):
    whole = request.getfixturevalue(kind)
    recipe = with_finish(teacher=str(second)) if kind == "online" else with_finish(logits=str(all_logits))
    update, stops = StageProgress.update, [NUM_TRAIN_STEPS, NUM_TRAIN_STEPS + 2]

    def update_and_stop(self, report):
        update(self, report)
        if stops and report.step == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StageProgress, "update", update_and_stop)
    for _ in range(2):
        with pytest.raises(Interrupted):
            start(first, recipe, tmp_path / "run")
    run = start(first, recipe, tmp_path / "run")
    assert same_weights(run, whole)
    assert torch.equal(metrics(run), metrics(whole))
    assert run.results()["stages"]["distill"]["kl"] == whole.results()["stages"]["distill"]["kl"]


def test_the_results_say_what_ended_each_phase(online):
    phases = online.results()["stages"]["distill"]["phases"]
    assert phases == [
        {"data": "train", "steps": NUM_TRAIN_STEPS, "tokens": 256, "ended_by": "budget"},
        {"data": "final_phase", "steps": NUM_FINISH_STEPS, "tokens": 384, "ended_by": "budget"},
    ]


def test_a_teacher_that_changed_is_refused(first, second, tmp_path, monkeypatch):
    other = copy_of(second, tmp_path / "second")
    recipe = with_finish(teacher=str(other))
    update = StageProgress.update
    monkeypatch.setattr(
        StageProgress, "update", lambda self, report: (update(self, report), os.kill(os.getpid(), signal.SIGTERM))
    )
    with pytest.raises(Interrupted):
        start(first, recipe, tmp_path / "run")
    monkeypatch.setattr(StageProgress, "update", update)
    assert "valid" in run_well("doctor", tmp_path / "run").stdout
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="a run with another teacher"):
        start(first, recipe, tmp_path / "run")


def test_another_vocabulary_is_refused_before_anything_is_loaded(first, second, tmp_path):
    other = copy_of(second, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = "Ġ", "!"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TeacherError, match=r"the vocabularies differ: id \d+ is '!' in first and is 'Ġ' in other"):
        start(first, with_finish(teacher=str(other)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ('data.final_phase=[{path: "teacher:other.txt"}]', "another text"),
        ("stages.distill.final_phase.sequence_length=16", "another sequence length: 24, expected 16"),
    ],
)
def test_logits_of_something_else_are_refused(first, all_logits, tmp_path, setting, says):
    (first / "other.txt").write_text((first / "text.txt").read_text().replace("mat", "hat"))
    recipe = apply_overrides(with_finish(logits=str(all_logits)), [setting])
    with pytest.raises(DataError, match=says):
        start(first, recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_logits_at_all_are_refused(first, tmp_path):
    with pytest.raises(DataError, match="holds no teacher logits"):
        start(first, with_finish(logits=str(tmp_path)), tmp_path / "run")


def test_a_signal_while_the_other_teacher_is_loaded_ends_at_once_and_costs_no_step(
    first, second, tmp_path, monkeypatch
):
    load, silences = SecondTeacher.load, []
    monkeypatch.setattr(Watchdog, "_end", lambda self, silent: silences.append(silent))

    def load_slowly(self: SecondTeacher, *arguments: Any) -> Any:
        before = len(silences)
        time.sleep(1.0)  # longer than the timeout below
        assert len(silences) == before, "loading was taken for a hang"
        os.kill(os.getpid(), signal.SIGTERM)
        return load(self, *arguments)

    monkeypatch.setattr(SecondTeacher, "load", load_slowly)
    recipe = apply_overrides(with_finish(teacher=str(second)), ["checkpoint.every_steps=100"])
    with pytest.raises(Interrupted, match="nothing is half-written"):
        convert(str(first), recipe, ConvertOptions(output=tmp_path / "run", hang_timeout=0.4))
    saved = checkpoint.newest_valid(tmp_path / "run" / "checkpoints", pytest.fail)
    assert saved is not None
    assert saved.global_step == NUM_TRAIN_STEPS


def test_a_position_that_a_stranger_wrote_is_refused(first, tmp_path, monkeypatch):
    update = StageProgress.update
    monkeypatch.setattr(
        StageProgress, "update", lambda self, report: (update(self, report), os.kill(os.getpid(), signal.SIGTERM))
    )
    with pytest.raises(Interrupted):
        start(first, with_finish(), tmp_path / "run")
    saved = checkpoint.newest_valid(tmp_path / "run" / "checkpoints", print)
    assert saved is not None
    for key, value in (("skipped", {"train": -1}), ("skipped", {"train": "x"}), ("plateau", {"total": "x"})):
        state = {**saved.state, "training_state": {**saved.state["training_state"], key: value}}
        with pytest.raises(CheckpointError, match="holds no valid training_state"):
            read_training_state(checkpoint.Checkpoint(saved.path, saved.global_step, state), STAGES)


STORIES = [
    "stages.orient.tokens=0",
    "stages.align.tokens=0",
    "stages.distill.tokens=8k",
    "stages.distill.sequence_length=128",
    "stages.distill.final_phase={tokens: 6k, sequence_length: 128}",
    "data.final_phase=[{path: teacher:../text/tinystories.txt}]",
    "evaluation={tokens: 3k, sequence_length: 512, batch_sequences: 8}",
]


@pytest.mark.full
def test_offline_equals_online_finishing_on_a_real_teacher(stories_teacher, tmp_path):
    """The real one finished by itself with noise in its weights; docs/log.md has the long form."""
    noisy = copy_of(stories_teacher, tmp_path / "noisy")
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: tensor + 0.2 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1
        else tensor
        for name, tensor in load_file(noisy / "model.safetensors").items()
    }
    save_file(weights, noisy / "model.safetensors", {"format": "pt"})
    recipe = apply_overrides(load_recipe("stories"), STORIES)
    settings = [part for setting in STORIES for part in ("--set", setting)]
    teach = ("cache-logits", noisy, "--for", stories_teacher, "--recipe", "stories", *settings)
    runs = {"first": [], "online": [f"stages.distill.final_phase.teacher={noisy}"]}
    runs["another order"] = [*runs["online"], "seed=1"]
    for top_k in (64, 512):
        folder = tmp_path / f"logits-{top_k}"
        run_well(*teach, "--top-k", top_k, "--output", folder)
        runs[f"k={top_k}"] = [f"stages.distill.final_phase.logits={folder}"]
    kl = {}
    for name, changes in runs.items():
        run = start(stories_teacher, apply_overrides(recipe, changes), tmp_path / name)
        kl[name] = run.results()["stages"]["distill"]["kl"]
    noise = abs(kl["another order"] - kl["online"])
    exact = abs(kl["k=512"] - kl["online"])  # the whole vocabulary: what is left is rounding
    assert exact < 0.02 * noise
    assert exact < 0.01 * abs(kl["online"] - kl["first"])
    # An eighth of the vocabulary changes less than another order of the text does; how much less depends on the CPU.
    assert abs(kl["k=64"] - kl["online"]) < 0.5 * noise


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_teacher_computes_with_the_weights_it_says(first, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional

    from mohawkify.teacher.load import load_teacher
    from mohawkify.teacher.resolve import resolve_teacher

    folder = make_teacher(tmp_path / "teacher", hidden_size=64, intermediate_size=128)
    device = torch.device("cpu")
    plain, quantised = (
        load_teacher(resolve_teacher(str(folder)), dtype=torch.float32, device=device, bits=b) for b in (None, bits)
    )
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if type(module).__name__ == "Linear4bit":
                weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            elif type(module).__name__ == "Linear8bitLt":
                weight = module.weight.data.float() * module.weight.SCB[:, None] / 127
            else:
                continue
            original = plain.get_submodule(name).weight
            assert 0 < (weight - original).norm() / original.norm() < (0.02 if bits == 8 else 0.15)
            original.copy_(weight)
    assert quantised.get_memory_footprint() < 0.6 * tiny_teacher("llama", **SIZES).get_memory_footprint()
    ids = torch.arange(4, 40).view(2, 18)
    with torch.no_grad():
        ours, theirs = (model(ids).logits.log_softmax(-1) for model in (quantised, plain))
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert kl < 0.02  # 8 bits round the inputs of each product as well


SIZES = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128}


def test_a_quantised_teacher_finishes_a_run(first, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = make_teacher(tmp_path / "teacher", hidden_size=64, intermediate_size=128)
    lines: list[str] = []
    run = start(first, with_finish(teacher=str(folder), teacher_bits=8), tmp_path / "run", lines)
    assert any("teacher finishes the run" in line for line in lines)
    whole = start(first, with_finish(teacher=str(folder)), tmp_path / "whole")
    ours, theirs = metrics(run)[NUM_TRAIN_STEPS:], metrics(whole)[NUM_TRAIN_STEPS:]
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)


def test_four_bits_on_a_cpu_need_rows_that_can_be_packed(tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = make_teacher(tmp_path / "teacher", hidden_size=64, intermediate_size=44)
    from mohawkify.teacher.load import load_teacher
    from mohawkify.teacher.resolve import resolve_teacher

    with pytest.raises(TeacherError, match="has 44 rows, expected a multiple of 32"):
        load_teacher(resolve_teacher(str(folder)), dtype=torch.float32, device=torch.device("cpu"), bits=4)
