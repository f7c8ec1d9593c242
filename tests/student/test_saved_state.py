"""Saved states: going on from one is reading all, and no other file is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mohawkify.evaluation.generation import GenerateOptions, generate_text, read_on, remember, write_on
from mohawkify.student.saved_state import ReadText, load_state, save_state
from tests.bytes_tokenizer import bytes_tokenizer
from tests.close import assert_close
from tests.commands import run, run_well
from tests.finished import finished_run, tiny_student

LONG, MORE = "The cat sat on the mat, and the dog", " ran away."
SHORT_WINDOWS = {"num_hidden_layers": 2}  # the tiny Gemma and Mistral have windows of 5 tokens
HASH = "0" * 64


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs and a state of the first."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in (("one", {}), ("other", {"initializer_range": 0.2, "hidden_size": 64})):
        finished_run(folder / name, keep=(1,), **changes)
    run_well("generate", folder / "one", LONG, "--max-tokens", 1, "--save-state", folder / "state")
    return folder


def refused(path: Path, run_folder: Path, says: str) -> None:
    result = run("generate", run_folder, MORE, "--load-state", path)
    lines = result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (66, ""), result.stderr
    assert [line.split(":")[0] for line in lines[-2:]] == ["error", "hint"]
    assert says in lines[-2]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "keep"),
    [
        ("llama", ()),
        ("llama", (0, 2)),
        ("mistral", (1,)),
        ("gemma3_text", (0,)),
        ("gemma3_text", (1,)),
        ("gpt2", (0,)),
        ("llama", {"layers": (2,), "heads": ((0, 1), (1, 0)), "window": 6}),
        ("gemma3_text", {"heads": ((0, 1), (1, 2))}),
    ],
)
def test_going_on_from_a_state_is_reading_all(tmp_path, family, keep):
    student, _ = tiny_student(family, tmp_path / "teacher", keep, **(SHORT_WINDOWS if family == "gemma3_text" else {}))
    tokenizer = bytes_tokenizer()
    read = read_on(student, tokenizer, ReadText(), LONG)
    remember(student, read)
    save_state(tmp_path / "state", read, HASH)
    loaded = read_on(student, tokenizer, load_state(tmp_path / "state", student, HASH), MORE)
    assert loaded.ids == tokenizer(LONG + MORE).input_ids
    assert loaded.num_read == len(tokenizer(LONG).input_ids) - 1
    new = torch.tensor([loaded.ids[loaded.num_read :]])
    logits = student(new, past_key_values=load_state(tmp_path / "state", student, HASH).cache).logits
    whole = student(torch.tensor([loaded.ids]), use_cache=False).logits[:, loaded.num_read :]
    assert_close("logits", logits, whole)
    written = write_on(student, tokenizer, loaded, GenerateOptions(max_tokens=12))
    assert written == generate_text(student, tokenizer, LONG + MORE, GenerateOptions(max_tokens=12)) != ""
    # What was written is in the memory too, and the next text goes on from there.
    num_read = loaded.num_read
    again = read_on(student, tokenizer, loaded, " Then")
    assert num_read == len(again.ids) - len(" Then") - 1 == again.num_read


def test_a_state_without_attention_stays_the_same_size_however_long_the_text(tmp_path):
    student, _ = tiny_student("llama", tmp_path / "teacher")
    sizes = []
    for text in (LONG, LONG * 20):
        read = read_on(student, bytes_tokenizer(), ReadText(), text)
        remember(student, read)
        save_state(tmp_path / f"{len(text)}", read, HASH)
        tensors = safetensors.torch.load_file(tmp_path / f"{len(text)}")
        sizes.append(sum(each.nbytes for name, each in tensors.items() if name != "token_ids"))
    assert sizes[0] == sizes[1] > 0


def test_a_word_is_put_together_where_the_state_allows_it(tmp_path):
    student, _ = tiny_student("llama", tmp_path / "teacher")
    pieces = ["a", "b", "c", "d", "x", "cd", "bcd", "abcd", "xd"]
    merges = [("c", "d"), ("b", "cd"), ("a", "bcd"), ("x", "d")]
    backend = Tokenizer(BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)

    def tokens(text: str, more: str) -> list[str]:
        read = read_on(student, tokenizer, ReadText(), text)
        remember(student, read)
        return tokenizer.convert_ids_to_tokens(read_on(student, tokenizer, read, more).ids)

    assert tokens("abx", "d") == ["a", "b", "xd"]
    assert tokens("abc", "d") == ["a", "b", "c", "d"]  # and not abcd, of which a and b are read


def test_the_command_goes_on_with_the_same_text_and_keeps_what_is_there(runs, tmp_path):
    whole = run_well("generate", runs / "one", LONG + MORE, "--max-tokens", 12).stdout
    longer = tmp_path / "longer"
    more = ("generate", runs / "one", MORE, "--max-tokens", 12, "--load-state", runs / "state")
    assert LONG + run_well(*more, "--save-state", longer).stdout == whole
    third = run_well("generate", runs / "one", "", "--max-tokens", 12, "--load-state", longer).stdout
    assert LONG + MORE + third == whole
    before = longer.read_bytes()
    assert "exists already" in run(*more, "--save-state", longer).stderr
    assert "the teacher, which has no state" in run(*more, "--teacher").stderr
    assert longer.read_bytes() == before


def test_a_state_of_another_model_is_refused(runs):
    refused(runs / "state", runs / "other", "was saved with another model")


def test_every_damage_is_one_line(runs, tmp_path):
    whole, file = (runs / "state").read_bytes(), tmp_path / "state"
    for length in (0, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(file, runs / "one", "state")
    for place in (0, 40, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused(file, runs / "one", "state")


def test_what_is_no_state_is_refused(runs, tmp_path):
    (tmp_path / "text").write_text("Once upon a time\n" * 99)
    refused(tmp_path / "text", runs / "one", "expected a saved state")
    refused(runs / "one" / "final" / "model.safetensors", runs / "one", "holds no saved state")
    refused(tmp_path, runs / "one", "is no file")
    refused(tmp_path / "absent", runs / "one", "is no file")


def test_a_state_made_up_with_a_right_hash_is_still_compared_with_the_model(runs, tmp_path):
    student, _ = tiny_student("llama", tmp_path / "teacher", (1,))
    read = read_on(student, bytes_tokenizer(), ReadText(), LONG)
    remember(student, read)
    cache = read.cache

    def saved(change) -> str:
        change()
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        save_state(file, read, HASH)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            load_state(file, student, HASH)
        return str(caught.value)

    states, attention = cache.layers[0].states, cache.layers[1]
    good = states["recurrent_states"]
    assert "not finite" in saved(lambda: states.update(recurrent_states=torch.full_like(good, torch.nan)))
    assert "another shape" in saved(lambda: states.update(recurrent_states=good[:, :1]))
    assert "another shape" in saved(lambda: states.update(recurrent_states=good.bfloat16()))
    assert "not those of this model" in saved(lambda: states.update(more=good))
    states.pop("more")
    states["recurrent_states"] = good
    assert "another shape" in saved(lambda: setattr(attention, "values", attention.values[:, :, 1:]))
    assert "tokens are not of this model" in saved(lambda: read.ids.append(10**6))
