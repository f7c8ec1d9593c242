"""Recipes: what the schema accepts and refuses, overrides, and the way back to YAML."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mohawkify.errors import RecipeError
from mohawkify.recipe import strict_yaml
from mohawkify.recipe.loading import apply_overrides, dump_recipe, load_recipe, parse_recipe
from mohawkify.recipe.schema import AlignRecipe, OrientRecipe, Recipe, Segment
from mohawkify.recipe.types import format_count, parse_count

SMALL = """\
name: small
description: a recipe for tests
student:
  state_size: 16
data:
  train:
    - path: texts/*.jsonl
      where:
        - {column: score, operator: ">=", value: 4.0}
  final_phase:
    - hub: someone/chats
      chat: messages
stages:
  orient: {tokens: 80M, sequence_length: 128, batch_sequences: 8, learning_rate: 1e-4}
  align: {tokens: 300k, sequence_length: 128, batch_sequences: 8, learning_rate: 0.001}
  distill:
    tokens: 2.7B
    sequence_length: 256
    batch_sequences: 16
    learning_rate: 5e-5
    final_phase:
      tokens: 1e6
      sequence_length: 512
"""


@pytest.fixture(scope="module")
def small() -> Recipe:
    return parse_recipe(SMALL, "small.yaml")


def refusal(text: str) -> str:
    """Returns the one line with which a recipe text is refused."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "small.yaml")
    assert len(caught.value.message.splitlines()) == 1
    return caught.value.message


def override_refusal(recipe: Recipe, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        apply_overrides(recipe, list(overrides))
    assert len(caught.value.message.splitlines()) == 1
    return caught.value.message


# What the schema reads


def test_values_are_read_as_meant(small: Recipe) -> None:
    assert small.stages.orient.tokens == 80_000_000
    assert small.stages.align.tokens == 300_000
    assert small.stages.distill.tokens == 2_700_000_000
    assert small.stages.distill.final_phase is not None
    assert small.stages.distill.final_phase.tokens == 1_000_000
    assert small.stages.orient.learning_rate == 1e-4
    assert small.data.train[0].where[0].value == 4.0
    assert small.student.conv_kernel == 4
    assert small.compute.micro_batch_sequences is None


def test_a_recipe_does_not_change(small: Recipe) -> None:
    with pytest.raises(ValueError, match="frozen"):
        small.seed = 1  # type: ignore[misc]
    assert hash(small) == hash(parse_recipe(SMALL, "again.yaml"))


@pytest.mark.parametrize(
    ("text", "count"),
    [("80M", 80_000_000), ("2.7B", 2_700_000_000), ("300k", 300_000), ("1e6", 1_000_000), (5e5, 500_000), (0, 0)],
)
def test_counts(text: str | float, count: int) -> None:
    assert parse_count(text) == count
    assert parse_count(format_count(count)) == count


@given(st.integers(0, 10**15))
def test_a_count_survives_being_written(count: int) -> None:
    assert parse_count(format_count(count)) == count


@pytest.mark.parametrize(
    ("count", "written"), [(2_760_000_000, "2.76B"), (80_000_000, "80M"), (131_072, 131_072), (999, 999), (1000, "1k")]
)
def test_counts_are_written_short_only_where_it_reads_better(count: int, written: str | int) -> None:
    assert format_count(count) == written


@pytest.mark.parametrize("text", ["5 B", "B", "-1k", "1.5", "0.0001k", "1e-2", "1K", "1_000", "٣", "9" * 60, math.nan])
def test_what_is_no_count(text: str | float) -> None:
    with pytest.raises(RecipeError, match="expected a count such as 80M"):
        parse_recipe(SMALL.replace("tokens: 80M", f"tokens: {text}" if isinstance(text, str) else "tokens: .nan"), "x")


def test_segments_end_with_the_finish(small: Recipe) -> None:
    assert small.stages.orient.segments() == [Segment("train", 78125, 128)]
    assert small.stages.distill.segments() == [
        Segment("train", round(2_699_000_000 / (16 * 256)), 256),
        Segment("final_phase", round(1_000_000 / (16 * 512)), 512),
    ]
    assert small.stages.distill.num_steps == 658936 + 122
    assert small.stages.distill.tokens_per_step == 16 * 256


def test_a_stage_without_tokens_has_no_steps_and_one_with_few_has_one() -> None:
    nothing = OrientRecipe(tokens=0, sequence_length=128, batch_sequences=8, learning_rate=1e-4)
    little = AlignRecipe(tokens=1, sequence_length=128, batch_sequences=8, learning_rate=1e-4)
    assert (nothing.segments(), nothing.num_steps) == ([], 0)
    assert little.segments() == [Segment("train", 1, 128)]


# What is refused: (what to replace, by what, what the message must say)

BAD = [
    pytest.param("state_size", "state_with", "small.yaml:4: student.state_with: unknown key", id="unknown key"),
    pytest.param("state_size", "state_with", "did you mean student.state_size?", id="guess among neighbours"),
    pytest.param("seed: 0", "learning_rate: 1", "did you mean stages.", id="guess among all keys"),
    pytest.param("tokens: 80M", "tokens: 5 B", 'small.yaml:14: stages.orient.tokens: found "5 B"', id="count"),
    pytest.param("tokens: 80M", "tokens: true", "small.yaml:14: stages.orient.tokens: found true", id="boolean"),
    pytest.param("tokens: 80M", "tokens: -1", "small.yaml:14: stages.orient.tokens: found -1", id="negative count"),
    pytest.param("16\n", "'16'\n", 'small.yaml:4: student.state_size: found "16"', id="text as number"),
    pytest.param("16\n", "16.0\n", "small.yaml:4: student.state_size: found 16.0", id="float as whole number"),
    pytest.param("16\n", "yes\n", 'found "yes", expected a whole number (at least 1, at most 65536)', id="yes is text"),
    pytest.param("16\n", "0\n", "small.yaml:4: student.state_size: found 0", id="out of range"),
    pytest.param("1e-4", ".nan", "small.yaml:14: stages.orient.learning_rate: found NaN", id="NaN"),
    pytest.param("1e-4", "1e999", "small.yaml:14: stages.orient.learning_rate: found Infinity", id="infinity"),
    pytest.param("1e-4", "true", "found true, expected a number above 0, auto", id="boolean as float"),
    pytest.param("1e-4", "0", "found 0, expected a number above 0, auto", id="zero learning rate"),
    pytest.param("1e-4", "9" * 5000, "small.yaml:14: found a number of more than 64 digits", id="endless number"),
    pytest.param("small\n", "../small\n", 'small.yaml:1: name: found "../small"', id="name with a path"),
    pytest.param("a recipe for tests", '"two\\nlines"', "small.yaml:2: description: found", id="two lines"),
    pytest.param(
        "seed: 0", "seed: 0\nseed: 1", "small.yaml:25: found the key 'seed' twice, first in line 24", id="twice"
    ),
    pytest.param("16\n", "16\n  state_size: 8\n", "small.yaml:5: found the key 'state_size' twice", id="twice inside"),
    pytest.param("16\n", "&width 16\n", "small.yaml:4: found an anchor or alias", id="anchor"),
    pytest.param("16\n", "*width\n", "small.yaml:4: found an anchor or alias", id="alias"),
    pytest.param("16\n", "!!int 16\n", "small.yaml:4: found a tag", id="standard tag"),
    pytest.param("16\n", "!!python/object/apply:os.getcwd []\n", "small.yaml:4: found a tag", id="python tag"),
    pytest.param("16\n", "! 16\n", "small.yaml:4: found a tag", id="bare tag"),
    pytest.param("16\n", "{<<: {state_size: 1}}\n", "small.yaml:4: student.state_size: found", id="merge key"),
    pytest.param("16\n", "[16\n", "not valid YAML", id="open bracket"),
    pytest.param("seed: 0", "? [a]\n: 1", "small.yaml:24: found a list or mapping as a key", id="list as key"),
    pytest.param("seed: 0", "--- {}", "small.yaml:24: not valid YAML", id="two documents"),
    pytest.param("seed: 0", "teacher: \x07", "small.yaml:24: found the character U+0007", id="control character"),
    pytest.param("seed: 0", 'teacher: "\\0"', "small.yaml:24: found a NUL", id="NUL"),
    pytest.param("seed: 0", 'teacher: "\\uD800"', "small.yaml:24: found a NUL or half of a surrogate", id="surrogate"),
    pytest.param("seed: 0", 'teacher: "\\UFFFFFFFF"', "not valid YAML", id="no such character"),
    pytest.param("seed: 0", f"teacher: {'[' * 20}", "nested more than 16 levels deep", id="deep"),
    pytest.param("seed: 0", f"teacher: [{'1,' * 6000}]", "found more than 5000 values", id="many values"),
    pytest.param("seed: 0", f"#{'x' * 300_000}", "found more than 256 kB", id="large"),
    pytest.param(
        "seed: 0", "schedule: {warmup: 0.9, decay: 0.2}", "small.yaml:24: schedule.decay: found 0.2", id="wsd"
    ),
    pytest.param("seed: 0", "compute: {micro_batch_sequences: 3}", "expected a divisor of stages.orient", id="divisor"),
    pytest.param("seed: 0", "optimizer: {betas: [0.9]}", "small.yaml:24: optimizer.betas.1: missing", id="one beta"),
    pytest.param("seed: 0", "optimizer: {betas: [0, 0, 0]}", "found [0, 0, 0], expected a list of 2", id="three betas"),
    pytest.param("seed: 0", "optimizer: {gradient_clip: 0}", "found 0, expected a number (above 0) or null", id="clip"),
    pytest.param("seed: 0", "optimizer: 3", "small.yaml:24: optimizer: found 3, expected a section", id="no section"),
    pytest.param(
        "tokens: 1e6", "tokens: 3B", "small.yaml:22: stages.distill.final_phase.tokens: found 3B", id="long finish"
    ),
    pytest.param(
        "  final_phase:\n    - hub: someone/chats\n      chat: messages\n",
        "",
        "without sources",
        id="no final_phase data",
    ),
    pytest.param(
        "    - path: texts/*.jsonl\n  ", "    - demo: train\n      hub: x\n  ", "found hub and demo", id="two places"
    ),
    pytest.param("path: texts/*.jsonl", "text: a", "small.yaml:7: data.train.0: found none", id="no place"),
    pytest.param(
        "path: texts/*.jsonl", "split: test\n      demo: train", "data.train.0.split: found", id="split of the demo"
    ),
    pytest.param('">="', "in", "small.yaml:9: data.train.0.where.0.value: found 4.0", id="in needs a list"),
    pytest.param("4.0}", "[4.0]}", "found a list, expected one value for the operator >=", id="list needs in"),
    pytest.param("4.0}", "{a: 1}}", 'found {"a": 1}, expected text, a number, true or false', id="mapping as value"),
    pytest.param("4.0}", ".inf}", "found Infinity, expected text, a number, true or false", id="infinite condition"),
    pytest.param('">="', '"~"', 'operator: found "~", expected ==, !=, <, <=, >, >= or in', id="operator"),
    pytest.param("name: small\n", "", "small.yaml:1: name: missing", id="missing key"),
    pytest.param(
        "learning_rate: 0.001", "train: [mlp]", "small.yaml:15: stages.align.learning_rate: missing", id="missing"
    ),
    pytest.param("seed: 0", "schedule: {floor: 1}", "schedule.floor: found 1.0, expected at most", id="a high floor"),
    pytest.param("  align:", "  _x: {objective: logits}\n  align:", "_x", id="a stage that no field can be named"),
    pytest.param("  align:", "  model_x: {objective: logits}\n  align:", "model_x", id="another one"),
    pytest.param("0.001}", "0.001, train: []}", "found [], expected a list of mixer, mlp", id="nothing learns"),
    pytest.param("0.001}", "0.001, train: [mlp, mlp]}", "each once", id="a part twice"),
    pytest.param("0.001}", "0.001, train: [mpl]}", 'stages.align.train.0: found "mpl"', id="no such part"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD)
def test_bad_input_is_refused_in_one_line_that_names_the_place(old: str, new: str, message: str) -> None:
    text = SMALL + "seed: 0\n"
    assert old in text
    found = refusal(text.replace(old, new, 1))
    assert message in found
    assert found.startswith("small.yaml:")


def test_several_errors_are_told_together() -> None:
    text = SMALL.replace("16\n", "0\n", 1).replace("tokens: 80M", "tokens: 5 B")
    assert refusal(text) == (
        "small.yaml:4: student.state_size: found 0, expected a whole number (at least 1, at most 65536); "
        'small.yaml:14: stages.orient.tokens: found "5 B", expected a count such as 80M'
    )


def test_many_errors_are_counted() -> None:
    unknown = "".join(f"unknown_{index}: 1\n" for index in range(9))
    assert refusal(SMALL + unknown).endswith("; and 4 more")


def test_the_hint_is_the_help_of_the_key() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(SMALL.replace("16\n", "0\n", 1), "small.yaml")
    assert caught.value.hint == "student.state_size: width of the state per head"


@pytest.mark.parametrize("text", ["", "3", "[]", "null", "just words"])
def test_what_is_no_mapping(text: str) -> None:
    assert "expected a section with the keys name, description" in refusal(text)


def test_plain_yaml_is_left_as_it_was() -> None:
    import yaml

    assert yaml.safe_load("{a: yes, b: 1e-4, c: &x 1, d: *x}") == {"a": True, "b": "1e-4", "c": 1, "d": 1}
    assert strict_yaml.load_yaml("{a: yes, b: 1e-4, c: 010}", "x")[0] == {"a": "yes", "b": 1e-4, "c": 10}


def test_every_key_and_item_has_its_line() -> None:
    data, lines = strict_yaml.load_yaml("a:\n  b: [1,\n    2]\n\nc: x\n", "x")
    assert data == {"a": {"b": [1, 2]}, "c": "x"}
    assert lines == {(): 1, ("a",): 1, ("a", "b"): 2, ("a", "b", 0): 2, ("a", "b", 1): 3, ("c",): 5}


# Files


def test_a_path_is_read(tmp_path: Path, small: Recipe) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    assert load_recipe(path) == small
    assert load_recipe(str(path)) == small


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"name: \xff", ":1: found bytes that are not UTF-8 text"),
        (b"#" * 300_000, ":1: found more than 256 kB of text"),
        (b"nmae: x", ":1: nmae: unknown key, did you mean name?"),
    ],
)
def test_a_bad_file_is_refused_by_its_path(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "my.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert caught.value.message.startswith(str(path))
    assert message in caught.value.message


@pytest.mark.parametrize("path", ["folder.yaml", "a\0b.yaml", "no/such/recipe"])
def test_what_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_an_unknown_name_brings_the_list_and_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"one of demo, llamba-1b, .*did you mean llamba-1b\?"):
        load_recipe("llama-1b")


# Overrides


def test_overrides_change_single_values(small: Recipe) -> None:
    changed = apply_overrides(
        small,
        [
            "stages.distill.tokens=5B",
            "stages.orient.learning_rate=2e-4",
            "data.train.0.path=other.txt",
            "data.train.1.demo=train",
            "stages.align.train=[mixer, norm]",
            "stages.align.final_phase.tokens=1k",
            "stages.align.final_phase.sequence_length=64",
            "stages.distill.final_phase=null",
            "student.name=",
            "seed=1",
            "seed=2",
        ],
    )
    assert changed.stages.distill.tokens == 5_000_000_000
    assert changed.stages.distill.final_phase is None
    assert changed.stages.orient.learning_rate == 2e-4
    assert [source.path for source in changed.data.train] == ["other.txt", None]
    assert changed.data.train[0].where == small.data.train[0].where
    assert changed.data.train[1].demo == "train"
    assert changed.stages.align.train == ("mixer", "norm")
    assert changed.stages.align.final_phase is not None
    assert changed.stages.align.final_phase.tokens == 1000
    assert changed.seed == 2
    assert changed.optimizer == small.optimizer
    assert small.seed == 0


def test_no_override_changes_nothing(small: Recipe) -> None:
    assert apply_overrides(small, []) == small


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.distill.tokns=5B", "--set: stages.distill.tokns: unknown key, did you mean stages.distill.tokens?"),
        ("stagse.distill.tokens=5B", "--set: stagse: unknown key, did you mean stages.distill.tokens?"),
        ("distill.tokens=5B", "did you mean stages.distill.tokens?"),
        ("data.train.0.pth=x", "did you mean data.train.0.path?"),
        ("zzz=1", "--set: zzz: unknown key, expected name, description,"),
        ("stages.distill.tokens=5 B", '--set: stages.distill.tokens: found "5 B", expected a count such as 80M'),
        ("stages.distill.tokens", "found no =, expected key=value"),
        ("=1", '--set: "": unknown key'),
        ("a..b=1", "--set: a: unknown key"),
        ("seed.x=1", "--set seed.x: seed holds a value and has no keys"),
        ("seed=[", "--set seed: not valid YAML"),
        ("seed=*x", "--set seed: found an anchor or alias"),
        ("seed=a: b", '--set: seed: found {"a": "b"}'),
        ("seed=true", "--set: seed: found true"),
        ("seed=1e99", "--set: seed: found 1e+99"),
        (
            "data.train.2.path=x",
            "--set data.train.2.path: found 2 for an item of data.train, expected an index of at most 1",
        ),
        ("data.train.x=1", 'found "x" for an item of data.train'),
        ("data.train.0.hub=x", "data.train.0: found path and hub, expected exactly one of path, hub and demo"),
        ("stages.align.final_phase.tokens=5", "stages.align.final_phase.sequence_length: missing"),
        ("compute.micro_batch_sequences=5", "expected a divisor of stages.orient.batch_sequences, 8"),
        ("stages.align.train=[embedding]", "stages.align.train.0: found"),
        ("stages.align.train=[]", "expected a list of mixer, mlp, norm, each once"),
        ("two\nlines=1", '--set: "two\\nlines": unknown key'),
    ],
)
def test_a_bad_override_is_refused_in_one_line(small: Recipe, override: str, message: str) -> None:
    assert message in override_refusal(small, override)


# Anything at all

words = st.sampled_from(
    [
        "name",
        "description",
        "stages",
        "orient",
        "tokens",
        "seed",
        "data",
        "train",
        "final_phase",
        "0",
        "path",
        "x",
        "null",
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def check_one_or_the_other(read: Callable[[], Recipe], source: str) -> None:
    """Either there is a recipe, and it survives being written, or there is one line of refusal."""
    try:
        recipe = read()
    except RecipeError as error:
        refused = error.message
    else:
        assert parse_recipe(dump_recipe(recipe), "dumped.yaml") == recipe
        return
    assert refused.startswith(source)
    assert len(refused.splitlines()) == 1


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet=" \n-:[]{},&*!|>'\"%@#?0.eandx\\U\t", max_size=60))
@example('"\\UFFFFFFFF"')
@example("%YAML 1." + "9" * 5000 + "\n--- 1")
@example("\ud800")
@example("? - a\n: b")
def test_any_text_is_refused_or_read(text: str) -> None:
    check_one_or_the_other(lambda: parse_recipe(text, "any.yaml"), "any.yaml:")


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(words, values, max_size=4))
def test_any_section_is_refused_or_read(section: dict) -> None:
    text = SMALL + strict_yaml.dump_yaml({"compute": section})
    check_one_or_the_other(lambda: parse_recipe(text, "any.yaml"), "any.yaml:")


@settings(max_examples=300, deadline=None)
@given(st.lists(words | st.text(max_size=5), max_size=5), values | st.text(max_size=12))
def test_any_override_is_refused_or_survives(small: Recipe, path: list[str], value: object) -> None:
    text = value if isinstance(value, str) else strict_yaml.dump_yaml([value]).removeprefix("- ")
    check_one_or_the_other(lambda: apply_overrides(small, [f"{'.'.join(path)}={text}"]), "--set")


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1))
@example("1e4")
@example("0123")
@example("null")
@example("12:30:45")
@example("=")
@example("a: b # c")
@example("- \x85\u2028\ufeff\x07")
def test_any_text_survives_being_written(small: Recipe, text: str) -> None:
    recipe = small.model_copy(update={"teacher": text})
    assert parse_recipe(dump_recipe(recipe), "dumped.yaml").teacher == text
