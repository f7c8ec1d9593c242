"""The recipes that come with mohawkify, and the page that documents them."""

import pytest

from mohawkify.recipe.bundled import recipe_names, recipe_text
from mohawkify.recipe.loading import dump_recipe, load_recipe, parse_recipe
from tests.conftest import ROOT
from tools import recipe_docs

DOCS = ROOT / "docs" / "recipes.md"
STAGES = ("orient", "align", "distill")


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_loads_and_survives_the_way_to_yaml_and_back(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.data.train
    assert parse_recipe(dump_recipe(recipe), "dumped.yaml") == recipe
    # Behind a calibrated start the stages that would undo it or gain nothing are left out.
    needed = STAGES[-1:] if recipe.student.init == "calibrated" else STAGES
    assert all(getattr(recipe.stages, stage).num_steps > 0 for stage in needed)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_says_how_to_run_it(name: str) -> None:
    comments = [line for line in recipe_text(name).splitlines() if line.startswith("#")]
    commands = [line for line in comments if "mohawkify convert" in line]
    assert len(commands) == 1
    assert commands[0].endswith(f"--recipe {name}")
    teacher = load_recipe(name).teacher
    assert teacher is None or f"mohawkify convert {teacher} " in commands[0]


@pytest.mark.parametrize(
    ("name", "teacher", "tokens", "distill_learning_rate"),
    [
        ("llamba-1b", "meta-llama/Llama-3.2-1B-Instruct", (300_000_000, 2_700_000_000, 5_000_000_000), 5e-5),
        ("llamba-3b", "meta-llama/Llama-3.2-3B-Instruct", (500_000_000, 4_000_000_000, 5_500_000_000), 5e-5),
        ("llamba-8b", "meta-llama/Llama-3.1-8B-Instruct", (500_000_000, 5_000_000_000, 6_500_000_000), 1e-5),
    ],
)
def test_llamba_recipes_are_the_published_ones(
    name: str, teacher: str, tokens: tuple[int, int, int], distill_learning_rate: float
) -> None:
    recipe = load_recipe(name)
    stages = [recipe.stages.orient, recipe.stages.align, recipe.stages.distill]
    assert recipe.teacher == teacher
    assert tuple(stage.tokens for stage in stages) == tokens
    assert [stage.batch_sequences for stage in stages] == [64, 128, 128]
    assert [stage.sequence_length for stage in stages] == [2048] * 3
    assert [stage.learning_rate for stage in stages] == [1e-4, 1e-4, distill_learning_rate]
    assert recipe.stages.distill.final_phase is not None
    assert recipe.stages.distill.final_phase.tokens == 4 * 200_000_000
    assert recipe.stages.distill.final_phase.sequence_length == 4096
    assert recipe.stages.align.target == "block"
    assert recipe.stages.distill.train == ("mixer", "mlp", "norm", "embedding", "head")
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.optimizer.weight_decay == 0.1
    assert (recipe.schedule.warmup, recipe.schedule.decay, recipe.schedule.floor) == (0.1, 0.1, 1e-8)
    assert recipe.compute.precision == "bf16"
    assert recipe.compute.activation_checkpointing
    assert (recipe.student.init, recipe.student.state_size, recipe.student.decay_bias) == ("identity", 64, False)
    (text,) = recipe.data.train
    assert text.hub == "HuggingFaceFW/fineweb-edu"
    assert [(item.column, item.operator, item.value) for item in text.where] == [("score", ">=", 4.0)]
    assert [source.hub for source in recipe.data.final_phase] == ["teknium/OpenHermes-2.5"]


@pytest.mark.parametrize(("name", "total"), [("llamba-1b", 8e9), ("llamba-3b", 10e9), ("llamba-8b", 12e9)])
def test_llamba_budgets_add_up(name: str, total: float) -> None:
    recipe = load_recipe(name)
    assert sum(getattr(recipe.stages, stage).tokens for stage in STAGES) == total


def test_phi_mamba_freezes_the_mlps() -> None:
    recipe = load_recipe("phi-mamba")
    assert [getattr(recipe.stages, stage).tokens for stage in STAGES] == [80_000_000, 160_000_000, 2_760_000_000]
    assert recipe.stages.align.target == "mixer"
    assert "mlp" not in {*recipe.stages.align.train, *recipe.stages.distill.train}
    assert [(source.hub, source.name) for source in recipe.data.train] == [("allenai/c4", "en")]


# The documentation


def test_the_page_lists_every_key_as_the_schema_has_it() -> None:
    page = DOCS.read_text(encoding="utf-8")
    renewed = recipe_docs.with_reference(page)
    assert page == renewed, "docs/recipes.md is behind the schema: write with_reference(page) into it"


def test_every_shipped_recipe_is_on_the_page() -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in recipe_names())


def test_every_field_says_what_it_is_for() -> None:
    rows = [line for line in recipe_docs.recipe_reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert all(row.split(" | ")[-1].removesuffix(" |").strip() for row in rows)


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks one of the marks"):
        recipe_docs.with_reference("# A page\n")
