"""Plans of the published recipes from real configurations, to the digit where papers give one, and their arithmetic."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from mohawkify.cli.plan_tables import plan_text
from mohawkify.errors import USAGE, RecipeError, UsageError
from mohawkify.objectives.hidden_state import HiddenStateObjective
from mohawkify.objectives.logits import LogitsObjective
from mohawkify.objectives.matrix import MatrixObjective
from mohawkify.objectives.objective import Runner
from mohawkify.planning.memory import Layout, remedies
from mohawkify.planning.planner import Machine, PlanInputs, _work, layout_of, trained_parameters
from mohawkify.planning.planning import PlanOptions, plan
from mohawkify.recipe.loading import apply_overrides, load_recipe
from mohawkify.student.build import checkpoint_activations
from mohawkify.teacher.resolve import resolve_teacher
from mohawkify.train.schedule import learning_rate
from tests.commands import run, run_well
from tests.tiny import packed, tiny_pair

# Llamba (arXiv 2502.14458), table 2 and sections 4.2 and 4.3; Phi-Mamba (arXiv 2408.10189): tokens of the stages, in
# all, and the peak learning rates, those of Phi-Mamba being Llamba's.
PUBLISHED = {
    "llamba-1b": ("Llama-3.2-1B-Instruct", (300_000_000, 2_700_000_000, 5_000_000_000), 8_000_000_000, 5e-5),
    "llamba-3b": ("Llama-3.2-3B-Instruct", (500_000_000, 4_000_000_000, 5_500_000_000), 10_000_000_000, 5e-5),
    "llamba-8b": ("Llama-3.1-8B-Instruct", (500_000_000, 5_000_000_000, 6_500_000_000), 12_000_000_000, 1e-5),
    "phi-mamba": ("phi-1_5", (80_000_000, 160_000_000, 2_760_000_000), 3_000_000_000, 5e-5),
}
STAGES = ("orient", "align", "distill")


@pytest.mark.parametrize("name", PUBLISHED)
def test_tokens_steps_and_schedule_are_the_published_ones(teacher_configs, name):
    teacher, tokens, in_all, last_rate = PUBLISHED[name]
    planned = plan(str(teacher_configs / f"{teacher}.json"), load_recipe(name))
    rows = planned["stages"]
    assert tuple(rows[stage]["budget_tokens"] for stage in STAGES) == tokens
    assert sum(row["budget_tokens"] for row in planned["phases"]) == in_all
    assert [rows[stage]["batch_sequences"] for stage in STAGES] == [64, 128, 128]
    assert [rows[stage]["learning_rate"] for stage in STAGES] == [1e-4, 1e-4, last_rate]
    assert {rows[stage]["floor"] for stage in STAGES} == {1e-8}
    final_phase = [row for row in planned["phases"] if row["text"] == "final_phase"]
    if name == "phi-mamba":
        assert not final_phase
        assert {row["sequence_length"] for row in planned["phases"]} == {2048}
    else:
        assert [(row["stage"], row["budget_tokens"], row["sequence_length"]) for row in final_phase] == [
            ("distill", 4 * 200_000_000, 4096)
        ]
    for row in planned["phases"]:
        assert row["tokens_per_step"] == row["batch_sequences"] * row["sequence_length"]
        assert row["steps"] == round(row["budget_tokens"] / row["tokens_per_step"])
        assert row["tokens"] == row["steps"] * row["tokens_per_step"]
        assert row["micro_batch_sequences"] * row["accumulation"] == row["batch_sequences"]
    for row in rows.values():
        assert row["warmup_steps"] == row["decay_steps"] == round(row["steps"] / 10)


def test_the_steps_of_llamba_1b_counted_by_hand(teacher_configs):
    planned = plan(str(teacher_configs / "Llama-3.2-1B-Instruct.json"), load_recipe("llamba-1b"))
    # 300M / (64 x 2048), 2.7B / (128 x 2048), 4.2B / (128 x 2048) and 0.8B / (128 x 4096), rounded.
    assert [row["steps"] for row in planned["phases"]] == [2289, 10300, 16022, 1526]
    assert [row["tokens"] for row in planned["phases"]] == [300_023_808, 2_700_083_200, 4_200_071_168, 800_063_488]
    row = planned["stages"]["distill"]
    assert (row["warmup_steps"], row["stable_steps"], row["decay_steps"]) == (1755, 14038, 1755)


@pytest.mark.parametrize("stage", STAGES)
def test_the_schedule_is_the_one_that_training_follows(teacher_configs, stage):
    recipe = load_recipe("llamba-1b")
    row = plan(str(teacher_configs / "Llama-3.2-1B-Instruct.json"), recipe)["stages"][stage]
    rates = [learning_rate(step, row["steps"], row["learning_rate"], recipe.schedule) for step in range(row["steps"])]
    first, last = row["warmup_steps"], row["steps"] - row["decay_steps"]
    assert rates[first - 1 : last] == [row["learning_rate"]] * (row["stable_steps"] + 1)
    assert all(earlier < later for earlier, later in pairwise(rates[:first]))
    assert all(earlier > later for earlier, later in pairwise(rates[last - 1 :]))
    assert rates[-1] > row["floor"]


def test_a_plan_for_gpus_shares_the_batch_and_prices_it(teacher_configs):
    config, recipe = str(teacher_configs / "Llama-3.2-1B-Instruct.json"), load_recipe("llamba-1b")
    one, eight = (
        plan(config, recipe, PlanOptions(gpu="H100", num_gpus=number, price_per_hour=2.0)) for number in (1, 8)
    )
    assert [row["steps"] for row in one["phases"]] == [row["steps"] for row in eight["phases"]]
    assert [row["accumulation"] for row in eight["phases"]] == [2, 4, 4, 4]
    assert eight["flops"] == one["flops"]
    assert eight["teacher_flops"] + eight["student_flops"] == eight["flops"]
    assert eight["seconds"] == pytest.approx(one["seconds"] / 8)
    assert eight["cost"] == pytest.approx(one["cost"])
    assert one["cost"] == pytest.approx(one["seconds"] / 3600 * 2.0)
    assert one["seconds"] == pytest.approx(one["flops"] / (989.4e12 * 0.3), rel=0.02)
    assert plan(config, recipe, PlanOptions(gpu="H100"))["cost"] is None
    faster, slower = (plan(config, recipe, PlanOptions(gpu=name))["seconds"] for name in ("H200", "A100"))
    assert faster <= one["seconds"] < slower


def test_what_does_not_fit_is_answered_with_figures(teacher_configs):
    config = str(teacher_configs / "Llama-3.1-8B-Instruct.json")
    planned = plan(config, load_recipe("llamba-8b"), PlanOptions(gpu="4090"))
    fit = planned["fit"]
    assert not fit["fits"]
    assert fit["peak_bytes"] == planned["peak_memory_bytes"] > fit["usable_bytes"]
    assert all(each["peak_bytes"] < fit["peak_bytes"] for each in fit["changes"])
    assert all(each["fits"] == (each["peak_bytes"] <= fit["usable_bytes"]) for each in fit["changes"])
    text = plan_text(planned)
    assert "does NOT fit the 4090" in text
    assert all(each["change"] in text for each in fit["changes"])
    assert not any(each["fits"] for each in fit["changes"])
    assert fit["together"]["peak_bytes"] < min(each["peak_bytes"] for each in fit["changes"])


def test_a_change_that_is_enough_is_enough(teacher_configs):
    config, recipe = str(teacher_configs / "Llama-3.1-8B-Instruct.json"), load_recipe("llamba-8b")
    assert plan(config, recipe, PlanOptions(gpu="H100", num_gpus=8))["fit"]["fits"]
    fit = plan(config, recipe, PlanOptions(gpu="H100", num_gpus=8, engine="deepspeed", zero=2))["fit"]
    assert not fit["fits"]
    assert fit["together"] is None
    changes = {each["change"]: each for each in fit["changes"]}
    sharded = changes["FSDP instead of DeepSpeed"]
    assert sharded["fits"]
    again = plan(config, recipe, PlanOptions(gpu="H100", num_gpus=8, engine="fsdp"))
    assert (again["fit"]["fits"], again["fit"]["peak_bytes"]) == (True, sharded["peak_bytes"])


def test_a_recipe_for_another_teacher_is_noticed(teacher_configs):
    recipe = load_recipe("llamba-1b")
    assert plan(str(teacher_configs / "Llama-3.2-1B-Instruct.json"), recipe, PlanOptions(gpu="H100"))["warnings"] == []
    (warning,) = plan(str(teacher_configs / "Llama-3.2-3B-Instruct.json"), recipe, PlanOptions(gpu="H100"))["warnings"]
    assert warning.startswith("the recipe was made for meta-llama/Llama-3.2-1B-Instruct, not for ")


def test_a_disk_that_is_too_small_is_noticed(teacher_configs, tmp_path):
    recipe = apply_overrides(load_recipe("llamba-8b"), ["stages.distill.tokens=1000000B"])
    config = str(teacher_configs / "Llama-3.1-8B-Instruct.json")
    planned = plan(config, recipe, PlanOptions(output=tmp_path / "not" / "there" / "yet"))
    assert planned["free_bytes"] > 0
    assert any("bytes of disk are needed" in warning for warning in planned["warnings"])
    assert plan(config, recipe)["free_bytes"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_gpus": 7}, "found 7, expected a divisor of stages.orient.batch_sequences, 64"),
        ({"num_gpus": 2, "engine": "single"}, "found 2 GPUs, expected 1"),
        ({"gpu": "TPU"}, "found TPU, expected one of"),
        ({"gpu": "h100", "num_gpus": 8, "engine": "fsdp", "zero": 2}, "--zero 2: found engine fsdp"),
        ({"gpu": "h100", "zero": 2}, "--zero 2: found engine single"),
    ],
)
def test_what_cannot_be_planned_is_refused(teacher_configs, arguments, message):
    with pytest.raises(UsageError, match=message):
        plan(str(teacher_configs / "Llama-3.2-1B-Instruct.json"), load_recipe("llamba-1b"), PlanOptions(**arguments))


def test_offloading_that_deepspeed_would_not_heed_is_refused(teacher_configs):
    config, recipe = str(teacher_configs / "Llama-3.2-1B-Instruct.json"), load_recipe("llamba-1b")
    for zero, offload, least in ((0, "all", 3), (2, "all", 3), (0, "optimizer", 1)):
        wanted = apply_overrides(recipe, [f"compute.zero={zero}", f"compute.offload={offload}"])
        with pytest.raises(
            RecipeError, match=f"found ZeRO-{zero}, expected at least ZeRO-{least} to offload {offload}"
        ):
            plan(config, wanted, PlanOptions(gpu="h100", num_gpus=2))
    for layout in (Layout("deepspeed", 1, 2), Layout("fsdp", 0, 2), Layout("single")):
        found = [remedy.layout for remedy in remedies(layout) if remedy.layout.offload == "all"]
        expected = ("fsdp", 0) if layout.engine == "fsdp" else ("deepspeed", 3)
        assert [(each.engine, each.zero) for each in found] == [expected]


def test_a_users_deepspeed_settings_are_planned_with(teacher_configs, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}')
    own = ["compute.zero=null", f"compute.deepspeed_config={file}"]
    found = plan(
        str(teacher_configs / "Llama-3.2-1B-Instruct.json"),
        apply_overrides(load_recipe("llamba-1b"), own),
        PlanOptions(gpu="h100", num_gpus=2),
    )
    assert (found["layout"]["zero"], found["layout"]["offload"]) == (1, "optimizer")


def test_a_finish_taught_by_another_is_named_and_kept_answers_cost_no_teacher(teacher_configs):
    def planned(*overrides: str) -> dict[str, Any]:
        return plan(
            str(teacher_configs / "Llama-3.2-1B-Instruct.json"), apply_overrides(load_recipe("llamba-1b"), overrides)
        )

    plain, other = planned(), planned("stages.distill.final_phase.teacher=some/Large")
    assert not any("taught by" in warning for warning in plain["warnings"])
    assert "the final phase is taught by some/Large: what that teacher takes is not in this plan" in other["warnings"]
    kept = planned("stages.distill.final_phase.logits=somewhere")["phases"]
    assert [row["teacher_flops"] > 0 for row in kept] == [row["text"] == "train" for row in kept]
    assert sum(row["seconds"] for row in kept) < sum(row["seconds"] for row in plain["phases"])


def test_passes_are_counted_as_training_takes_them_and_stages_left_out_do_not_matter(teacher_configs):
    uneven = ["stages.align.batch_sequences=12", "compute.micro_batch_sequences=4", "stages.orient.tokens=0"]
    uneven += ["stages.orient.batch_sequences=4", "stages.distill.batch_sequences=12"]
    recipe = apply_overrides(load_recipe("llamba-1b"), uneven)
    found = plan(str(teacher_configs / "Llama-3.2-1B-Instruct.json"), recipe, PlanOptions(gpu="h100", num_gpus=2))
    assert {(row["micro_batch_sequences"], row["accumulation"]) for row in found["phases"]} == {(4, 2)}
    assert layout_of(recipe, engine="auto", zero=None, num_gpus=3).micro_batch == 4


def test_several_gpus_of_no_kind_are_refused_where_there_is_none(teacher_configs):
    recipe = apply_overrides(load_recipe("llamba-1b"), ["compute.device=cpu"])
    with pytest.raises(UsageError, match="found 8 on a plan for cpu, expected 1"):
        plan(str(teacher_configs / "Llama-3.2-1B-Instruct.json"), recipe, PlanOptions(num_gpus=8))


def test_the_command_line_prints_tables_or_everything_as_json(teacher_configs):
    command = ("plan", teacher_configs / "SmolLM2-135M.json", "--recipe", "llamba-1b", "--gpu", "h100", "--gpus", 8)
    planned = json.loads(run_well(*command, "--price-per-hour", "2.5", "--engine", "fsdp", "--json").stdout)
    assert planned["layout"]["engine"] == "fsdp"
    assert planned["activations_counted"]
    text = plan_text(planned)
    assert "8 x H100 (FSDP)" in text
    assert "warning: the recipe was made for" in text
    assert all(f"{row['tokens']:,}" in text for row in planned["phases"])
    assert f"{planned['cost']:,.2f}" in text
    refused = run(*command[:4], "--gpu", "nothing")
    assert refused.exit_code == USAGE
    assert "expected one of H100" in refused.stderr


# The arithmetic, beside PyTorch's own count of the products that real stages take.


@pytest.mark.parametrize(
    ("stage", "checkpointing", "override"),
    [
        ("orient", False, "seed=0"),
        ("align", False, "seed=0"),
        ("align", True, "seed=0"),
        ("align", False, "stages.align.target=mixer"),
        ("distill", False, "seed=0"),
        ("distill", True, "seed=0"),
        ("distill", False, "stages.distill.train=[mixer, norm]"),
        ("distill", False, "student.keep.layers=[1]"),
    ],
)
def test_flops_are_those_that_pytorch_counts(tmp_path, stage, checkpointing, override):
    length, batch = 128, 2
    recipe = apply_overrides(load_recipe("llamba-1b"), ["student.state_size=32", override])
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
    student = {"state_size": 32, "keep": recipe.student.keep}
    pair = tiny_pair("llama", tmp_path / "teacher", student=student, **sizes)
    if checkpointing:
        checkpoint_activations(pair.student, pair.spec.layers)
    made = {
        "orient": MatrixObjective(pair, recipe.stages.orient),
        "align": HiddenStateObjective(pair, recipe.stages.align),
        "distill": LogitsObjective(pair, recipe.stages.distill),
    }[stage]
    trained = made.parameters()
    for name, parameter in pair.student.named_parameters():
        parameter.requires_grad_(name in trained)
    with FlopCounterMode(display=False) as counter:
        made.run(packed(length, batch), Runner(lambda loss: loss.backward()))
    teacher = resolve_teacher(str(tmp_path / "teacher")).spec
    own = getattr(recipe.stages, stage)
    sums = trained_parameters(stage, own, teacher, pair.spec)
    # Norms count with the MLPs, the last one among them.
    assert sum(sums.values()) == pytest.approx(sum(p.numel() for p in trained.values()), rel=0.005)
    layout = Layout("single", checkpointing=checkpointing)
    work = sum(_work(PlanInputs(teacher, pair.spec, recipe, Machine("cpu"), layout), own, length, sums))
    assert work == pytest.approx(counter.get_total_flops() / (batch * length), rel=0.12)


def test_a_calibration_is_planned_as_what_it_is(teacher_configs: Path) -> None:
    """No optimizer; the sums of its fullest pass; the teacher over all that its passes read."""
    recipe = apply_overrides(load_recipe("quick"), ["compute.device=cpu"])
    planned = plan(str(teacher_configs / "SmolLM2-135M.json"), recipe)
    row = planned["stages"]["calibrate"]
    assert (row["tokens"], row["trainable_parameters"], row["warmup_steps"], row["decay_steps"]) == (16_384, 0, 0, 0)
    assert row["memory"]["gradients"] == row["memory"]["optimizer"] == 0
    trunk = planned["stages"]["distill"]["teacher_flops"] / planned["stages"]["distill"]["tokens"]
    assert row["teacher_flops"] / row["tokens"] == pytest.approx((1 / 16 + 1 / 4 + 1 / 2 + 1) * trunk, rel=0.25)
    assert 0 < row["student_flops"] < row["teacher_flops"]
    # The float64 sums of 30 layers: 9 heads with 226 features each, and 576 + 1 inputs of the output projection.
    heads, output = 9 * 226 * 227, 577 * (577 + 576) + 1
    sums = 8 * 30 * max(heads, output)
    copies = 4 * planned["teacher"]["attention_parameters"]
    assert row["memory"]["buffers"] == sums + copies
    assert row["largest_micro_batch"] is None
    plans = [apply_overrides(recipe, [f"stages.calibrate.tokens={tokens}"]) for tokens in ("16k", "160k")]
    memory = [
        plan(str(teacher_configs / "SmolLM2-135M.json"), each)["stages"]["calibrate"]["memory_bytes"] for each in plans
    ]
    assert memory[0] == memory[1], "sums do not grow with the text"


def test_a_range_test_is_announced(teacher_configs: Path) -> None:
    recipe = apply_overrides(load_recipe("quick"), ["compute.device=cpu", "stages.distill.learning_rate=auto"])
    planned = plan(str(teacher_configs / "SmolLM2-135M.json"), recipe)
    assert "stage distill begins with a range test: about 60% of its time more" in planned["warnings"]
