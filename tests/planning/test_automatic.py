"""Recipes that nobody wrote: what a budget, a teacher and a machine make of the rules."""

from __future__ import annotations

from pathlib import Path

import pytest

import mohawkify
from mohawkify import Budget, PlanOptions
from mohawkify.distributed.device import multiplies_bf16
from mohawkify.errors import UsageError
from mohawkify.planning import automatic
from mohawkify.recipe.loading import dump_recipe, load_recipe, parse_recipe
from mohawkify.recipe.schema import Recipe
from tests.commands import run, run_well

BILLIONS = 8 * 10**9


def tokens_of(recipe: Recipe) -> dict[str, int]:
    return {name: block.tokens for name, block in recipe.stages.blocks().items()}


def test_billions_of_tokens_on_gpus_are_spent_as_the_published_recipe_spends_them(teacher_configs: Path) -> None:
    teacher, machine = str(teacher_configs / "Llama-3.2-1B-Instruct.json"), PlanOptions(gpu="H100", num_gpus=8)
    written, published = mohawkify.write_recipe(teacher, Budget(BILLIONS), (), machine), load_recipe("llamba-1b")
    for name in ("align", "distill"):
        ours, theirs = getattr(written.stages, name), getattr(published.stages, name)
        assert ours.tokens == pytest.approx(theirs.tokens, rel=0.05)
        assert (ours.sequence_length, ours.batch_sequences) == (theirs.sequence_length, theirs.batch_sequences)
        assert ours.learning_rate == "auto"
    # A calibration instead of the stage that turns matrices, which it makes needless.
    assert tokens_of(written)["orient"] == 0
    assert 16_000 < tokens_of(written)["calibrate"] < 200_000
    assert written.compute.precision == "bf16"
    assert written.schedule == published.schedule
    assert written.student.state_size == published.student.state_size
    assert mohawkify.plan(teacher, written, (), machine)["fit"]["fits"]


def test_a_large_teacher_recomputes_activations_where_memory_ends(teacher_configs: Path) -> None:
    teacher, machine = str(teacher_configs / "Llama-3.1-8B-Instruct.json"), PlanOptions(gpu="H100", num_gpus=8)
    written = mohawkify.write_recipe(teacher, Budget(BILLIONS), (), machine)
    assert written.compute.activation_checkpointing
    assert mohawkify.plan(teacher, written, (), machine)["fit"]["fits"]
    own = mohawkify.write_recipe(teacher, Budget(BILLIONS), ["compute.micro_batch_sequences=2"], machine)
    assert own.compute.micro_batch_sequences == 2


def test_a_small_budget_is_spent_as_the_recipe_quick_spends_it(teacher_configs: Path) -> None:
    written = mohawkify.write_recipe(str(teacher_configs / "SmolLM2-135M.json"), Budget(50_384), ["compute.device=cpu"])
    quick = load_recipe("quick")
    assert tokens_of(written) == {**tokens_of(quick), "calibrate": 16_384}
    assert written.stages.distill.learning_rate == quick.stages.distill.learning_rate
    assert written.stages.distill.tokens_per_step == quick.stages.distill.tokens_per_step
    assert (written.schedule, written.student.write) == (quick.schedule, quick.student.write)
    assert written.compute.precision == ("bf16" if multiplies_bf16("cpu") else "fp32")
    assert written.student.start == "calibrated"


def test_a_cpu_computes_in_bf16_only_where_it_has_instructions_for_it(
    teacher_configs: Path, stories_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def precision(teacher: Path, **capabilities: bool) -> str:
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
        written = mohawkify.write_recipe(str(teacher), Budget(50_000), ["compute.device=cpu"])
        return written.compute.precision

    assert precision(teacher_configs / "SmolLM2-135M.json", avx512_bf16=True) == "bf16"
    assert precision(teacher_configs / "SmolLM2-135M.json", avx512_f=True, avx512_bf16=False) == "fp32"
    assert precision(stories_teacher, amx_bf16=True) == "fp32"  # too narrow to gain


def test_longer_runs_align_half_of_the_text_and_measure_on_the_way(teacher_configs: Path) -> None:
    written = mohawkify.write_recipe(str(teacher_configs / "SmolLM2-135M.json"), Budget(10**6), ["compute.device=cpu"])
    assert written.stages.align.tokens == pytest.approx(written.stages.distill.tokens, rel=0.1)
    assert written.stages.align.train == ("mixer",)
    assert written.evaluation.every_tokens == 100_000


@pytest.mark.parametrize("tokens", [10_000, 50_000, 300_000, 1_234_567, 10**7, 10**9])
def test_the_stages_add_up_to_the_budget(teacher_configs: Path, tokens: int) -> None:
    written = mohawkify.write_recipe(str(teacher_configs / "SmolLM2-135M.json"), Budget(tokens), ["compute.device=cpu"])
    assert sum(tokens_of(written).values()) == tokens
    assert parse_recipe(dump_recipe(written), "kept.yaml") == written


def test_a_machine_with_little_memory_gets_smaller_micro_batches(
    teacher_configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = str(teacher_configs / "SmolLM2-135M.json")
    monkeypatch.setattr(automatic, "memory_bytes", lambda: 4 * 10**9)
    written = mohawkify.write_recipe(teacher, Budget(50_000), ["compute.device=cpu"])
    assert written.compute.micro_batch_sequences < written.stages.distill.batch_sequences


def test_a_budget_without_a_step_is_refused(teacher_configs: Path) -> None:
    teacher = str(teacher_configs / "SmolLM2-135M.json")
    with pytest.raises(UsageError, match="found 1,000 tokens, expected at least"):
        mohawkify.write_recipe(teacher, Budget(1000), ["compute.device=cpu"])
    with pytest.raises(UsageError, match="found a time, expected tokens"):
        mohawkify.write_recipe(teacher, Budget(seconds=60.0))


def test_the_command_line_prints_it_and_plans_by_it(teacher_configs: Path, tmp_path: Path) -> None:
    arguments = (teacher_configs / "SmolLM2-135M.json", "--tokens", "300k", "--set", "compute.device=cpu")
    file = tmp_path / "mine.yaml"
    file.write_text(run_well("recipes", "write", *arguments, "--data", "my notes.txt").stdout)
    assert load_recipe(file).data.train[0].path == "my notes.txt"
    assert "0.0001" in run_well("plan", *arguments).stdout
    for wrong in ((), ("--recipe", "quick", "--tokens", "1k")):
        refused = run("plan", arguments[0], *wrong)
        assert refused.exit_code == 2
        assert "expected exactly one of --recipe, --tokens and --time" in refused.stderr
    for wrong in (("--tokens", "some"), ("--tokens", "0"), ("--time", "2 hours")):
        assert "such as" in run("convert", arguments[0], *wrong).stderr
