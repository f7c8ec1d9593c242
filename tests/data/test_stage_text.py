"""Which text a recipe means: epochs, text that ends too early, text prepared ahead, and the commands around it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mohawkify.data.stage_text import TextReader, epochs_needed, tokens_needed
from mohawkify.errors import DataError, RecipeError
from mohawkify.files import atomic
from mohawkify.recipe.loading import apply_overrides, load_recipe, parse_recipe
from mohawkify.recipe.schema import Recipe
from tests.bytes_tokenizer import bytes_tokenizer
from tests.commands import RECIPE, make_recipe, make_teacher, run, run_well

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


def write(path: Path, number: int, letters: int = 19) -> Path:
    """Documents of letters + 1 tokens each."""
    path.write_text("".join(json.dumps({"text": f"{index:05d}".ljust(letters, "x")}) + "\n" for index in range(number)))
    return path


def recipe_for(train: Path, *overrides: str, validation: bool = True) -> Recipe:
    recipe = parse_recipe(RECIPE, "tiny.yaml")
    paths = [f"data.train={json.dumps([{'path': str(train)}])}"]
    if validation:
        paths.append(f"data.validation={json.dumps([{'path': str(train)}])}")
    return apply_overrides(recipe, [*paths, *overrides])


def reader(recipe: Recipe, folder: Path, **settings: Any) -> TextReader:
    tokenizer = bytes_tokenizer(chat_template=CHAT_TEMPLATE)
    return TextReader(recipe, tokenizer, folder / "corpora", folder, 258, **settings)


# --- epochs ---------------------------------------------------------------------------------------------------------

NEEDED = 448  # tokens of the recipe's three stages


@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
def test_as_many_tokens_are_taken_as_the_epochs_need(tmp_path: Path, epochs: int) -> None:
    recipe = recipe_for(write(tmp_path / "a.jsonl", 100), f"data.epochs={epochs}")
    corpus = reader(recipe, tmp_path).training()["train"]
    assert corpus.num_tokens == tokens_needed(recipe, "train") == -(-NEEDED // 16 // epochs) * 16
    assert epochs_needed(recipe, "train", corpus.num_tokens) == epochs


def test_text_that_ends_before_the_stages_is_refused_with_what_would_do(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", 10)
    with pytest.raises(DataError) as caught:
        reader(recipe_for(file), tmp_path).training()
    assert caught.value.message == (
        "the text of data.train has 200 tokens, but 448 are needed where it is read once; it would have to be read"
        " 3 times"
    )
    assert "data.epochs: 3" in str(caught.value.hint)
    with pytest.raises(DataError, match="read 2 times; it would have to be read 3 times"):
        reader(recipe_for(file, "data.epochs=2"), tmp_path).training()
    for allowed in ("3", "null"):
        corpus = reader(recipe_for(file, f"data.epochs={allowed}"), tmp_path).training()["train"]
        assert corpus.num_tokens == (160 if allowed == "3" else 200)


def test_without_a_limit_all_text_that_is_needed_is_read_once(tmp_path: Path) -> None:
    corpus = reader(recipe_for(write(tmp_path / "a.jsonl", 100), "data.epochs=null"), tmp_path).training()["train"]
    assert corpus.num_tokens == NEEDED


def test_the_held_out_end_is_not_counted(tmp_path: Path) -> None:
    enough = (NEEDED + 200) // 20 + 1
    for number, is_enough in ((enough, True), (enough - 2, False)):
        recipe = recipe_for(write(tmp_path / f"{number}.jsonl", number), "data.validation=[]", validation=False)
        text = reader(recipe, tmp_path)
        if is_enough:
            assert text.training()["train"].num_tokens >= NEEDED
            assert sum(len(row) for row in text.held_out()) > 100
        else:
            with pytest.raises(DataError, match="2 times"):
                text.training()


def test_the_end_of_a_stage_has_epochs_of_its_own(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", 100)
    final_phase = f"data.final_phase={json.dumps([{'path': str(file)}])}"
    settings = [
        "data.final_phase_epochs=4",
        "stages.distill.final_phase={tokens: 128, sequence_length: 32}",
        final_phase,
    ]
    recipe = recipe_for(file, *reversed(settings))
    corpora = reader(recipe, tmp_path).training()
    assert corpora["final_phase"].num_tokens == 32  # 128 tokens: four times one sequence for one of the batch's four
    short = json.dumps([{"path": str(write(tmp_path / "short.jsonl", 1))}])
    text = reader(apply_overrides(recipe, [f"data.final_phase={short}"]), tmp_path)
    with pytest.raises(DataError, match="has 20 tokens, expected at least one sequence of 32"):
        text.training()


@pytest.mark.parametrize("name", ["llamba-1b", "llamba-3b", "llamba-8b"])
def test_the_published_tail_is_four_epochs_of_200_million_tokens(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.data.final_phase_epochs == 4
    # In whole batches: half a batch more or less.
    assert abs(tokens_needed(recipe, "final_phase") - 200e6) < 128 * 4096
    assert recipe.data.epochs == 1


def test_weights_are_given_to_all_or_none() -> None:
    mixed = "data.train=[{path: a.txt, weight: 1}, {path: b.txt}]"
    with pytest.raises(RecipeError, match=r"data\.train\.1.*found no weight beside sources with one"):
        apply_overrides(parse_recipe(RECIPE, "tiny.yaml"), [mixed])


# --- prepared ahead -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "tiny-llama")


def test_a_conversion_uses_what_was_prepared_and_gives_the_same(teacher: Path, tmp_path: Path) -> None:
    recipe, prepared = make_recipe(tmp_path), tmp_path / "prepared"
    found = json.loads(run_well("data", "prepare", teacher, "--recipe", recipe, "--output", prepared, "--json").stdout)
    assert list(found["corpora"]) == ["train"]
    facts = found["corpora"]["train"]
    assert facts["tokens"] == sum(source["tokens"] for source in facts["sources"])
    again = json.loads(run_well("data", "prepare", teacher, "--recipe", recipe, "--output", prepared, "--json").stdout)
    assert again["corpora"] == found["corpora"]

    with_it, without = tmp_path / "with", tmp_path / "without"
    run_well("convert", teacher, "--recipe", recipe, "--output", with_it, "--prepared", prepared)
    run_well("convert", teacher, "--recipe", recipe, "--output", without, "--prepared", tmp_path / "none")
    assert [path.name for path in (with_it / "corpora").iterdir() if path.is_dir()] == []
    assert (with_it / "final" / "model.safetensors").read_bytes() == (
        without / "final" / "model.safetensors"
    ).read_bytes()
    assert run("doctor", with_it).exit_code == 0
    result = run_well("eval", with_it, "--json")
    assert "warning" not in result.stderr

    # Damage is found through the note; text that is gone is named.
    (folder,) = (path for path in prepared.iterdir() if path.is_dir())
    tokens = folder / "shard-00000" / "tokens.bin"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-4] + b"\0\0\0\0")
    assert run("doctor", with_it).exit_code == 66
    assert "the tokenised text is damaged" in run("eval", with_it).stderr
    tokens.write_bytes(content)
    run_well("eval", with_it)
    shutil.move(prepared, tmp_path / "away")
    gone = run("eval", with_it)
    assert gone.exit_code == 66
    assert "which is not there" in gone.stderr


def test_text_of_another_recipe_is_not_used(teacher: Path, tmp_path: Path) -> None:
    recipe, prepared = make_recipe(tmp_path), tmp_path / "prepared"
    run_well("data", "prepare", teacher, "--recipe", recipe, "--output", prepared, "--set", "stages.orient.tokens=64")
    run_well("convert", teacher, "--recipe", recipe, "--output", tmp_path / "run", "--prepared", prepared)
    assert [path.name for path in (tmp_path / "run" / "corpora").glob("*.json")] == []


def test_a_note_that_was_changed_is_refused(teacher: Path, tmp_path: Path) -> None:
    recipe = recipe_for(write(tmp_path / "a.jsonl", 100))
    reader(recipe, tmp_path / "ahead").training()
    prepared = tmp_path / "ahead" / "corpora"
    first = reader(recipe, tmp_path, prepared=prepared).training()["train"]
    (note,) = (path for path in (tmp_path / "corpora").glob("*.json"))
    noted = atomic.read_json(note)
    note.write_text(json.dumps({**noted, "fingerprint": "0" * 64}))
    with pytest.raises(DataError, match="holds other text than when the run began"):
        reader(recipe, tmp_path, prepared=prepared).training()
    note.write_text(json.dumps(noted))
    np.testing.assert_array_equal(reader(recipe, tmp_path).training()["train"].tokens, first.tokens)


def talker(teacher: Path, folder: Path, question: str, num_talks: int) -> str:
    """Copy a teacher and write conversations beside it; returns the override that reads them."""
    shutil.copytree(teacher, folder)
    bytes_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    talk = {"talk": [{"role": "user", "content": question}, {"role": "assistant", "content": "a short answer"}]}
    (folder / "talk.jsonl").write_text((json.dumps(talk) + "\n") * num_talks)
    return "data.train=[{path: 'teacher:talk.jsonl', chat: talk}]"


def test_conversations_without_an_answer_are_refused(teacher: Path, tmp_path: Path) -> None:
    source = talker(teacher, tmp_path / "chat", "why " * 300, 3)
    options = ["--recipe", make_recipe(tmp_path), "--set", source, "--output", tmp_path / "run"]
    result = run("convert", tmp_path / "chat", *options)
    assert result.exit_code == 66
    assert "of data.train is a completion: no prediction would count" in result.stderr


def test_conversations_prepared_inspected_and_converted(teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "chat")
    bytes_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    talks = [
        {"talk": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"answer {number}"}]}
        for number in range(60)
    ]
    (folder / "talk.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    source = "data.train=[{path: 'teacher:talk.jsonl', chat: talk}]"
    arguments = ["--recipe", make_recipe(tmp_path), "--output", tmp_path / "prepared", "--set", source]
    table = run_well("data", "prepare", folder, *arguments).stdout
    assert "train" in table
    found = json.loads(run_well("data", "inspect", tmp_path / "prepared", "--json", "--documents", 1).stdout)
    ((_, facts),) = found["corpora"].items()
    assert facts["completion_tokens"] < facts["tokens"]
    assert facts["shown"][0]["text"] == "<s><user>q0</s><assistant>⟦answer 0</s>⟧"
    assert "⟦answer 0</s>⟧" in run_well("data", "inspect", tmp_path / "prepared").stdout
    whole, ahead = tmp_path / "run", tmp_path / "prepared"
    run_well("convert", folder, *arguments[:2], *arguments[4:], "--output", whole, "--prepared", ahead)
    completions, everything = (
        run_well("convert", folder, *arguments[:2], "--set", each, "--output", tmp_path / f"run-{number}").stdout
        for number, each in enumerate((source, source.replace("chat: talk", "chat: talk, loss: all")))
    )
    weights = [(Path(each.strip()) / "final" / "model.safetensors").read_bytes() for each in (completions, everything)]
    assert weights[0] == (whole / "final" / "model.safetensors").read_bytes()
    assert weights[0] != weights[1]
    moved = shutil.move(folder, tmp_path / "moved")
    assert "(without its tokenizer)" in run_well("data", "inspect", tmp_path / "prepared").stdout
    assert "⟦answer 0" in run_well("data", "inspect", tmp_path / "prepared", "--teacher", moved).stdout
    assert run("data", "inspect", tmp_path).exit_code == 2
