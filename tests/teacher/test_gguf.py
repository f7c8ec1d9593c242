"""Teachers in GGUF files are the models that they were written from, and damaged files are refused in one line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError

from mohawkify.errors import DiskFullError, MissingExtraError, MohawkifyError, StorageError, TeacherError
from mohawkify.files.atomic import read_json, write_json
from mohawkify.teacher.load import load_teacher
from mohawkify.teacher.resolve import resolve_teacher
from tests.commands import make_recipe, make_teacher, run, run_well
from tests.teacher.gguf_files import CASES, TEMPLATE, tiny_model, write_gguf

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mohawkify" / "gguf"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A file without a fault."""
    return write_gguf(tmp_path_factory.mktemp("good") / "tiny.gguf")


def loaded(source: Path) -> Any:
    return load_teacher(resolve_teacher(str(source)), dtype=torch.float32, device=torch.device("cpu"))


def refusal(source: Path) -> str:
    """The line with which a source is refused; the cache must be left without a trace of it."""
    with pytest.raises(MohawkifyError) as caught:
        resolve_teacher(str(source))
    line = str(caught.value)
    assert "\n" not in line
    assert ".tmp-" not in line
    return line


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_the_model_that_it_was_written_from(case, tmp_path):
    model: Any = tiny_model(case)
    found = loaded(write_gguf(tmp_path / "tiny.gguf", case, model))
    torch.testing.assert_close(found(IDS).logits, model(IDS).logits)


def test_quantised_numbers_are_those_that_the_file_holds(tmp_path):
    import gguf

    model: Any = tiny_model("llama")
    teacher = resolve_teacher(str(write_gguf(tmp_path / "tiny.gguf", model=model, kind="Q8_0")))
    q8 = gguf.GGMLQuantizationType.Q8_0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.numpy(), q8), q8)))
    found = load_teacher(teacher, dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(found(IDS).logits, model(IDS).logits)
    assert teacher.gguf is not None
    assert (teacher.gguf["quantised"], teacher.gguf["types"]) == (True, {"Q8_0": 15, "F32": 5})


def test_it_is_read_once_and_is_then_a_folder_like_any_other(good, cache, monkeypatch):
    teacher = resolve_teacher(str(good))
    assert (teacher.name, teacher.source, teacher.spec.source) == ("tiny", str(good), str(good))
    assert teacher.folder is not None
    assert [teacher.folder] == list(cache.iterdir())
    tokenizer: Any = teacher.tokenizer
    assert tokenizer("that").input_ids == [256, *tokenizer.convert_tokens_to_ids(["t", "h", "a", "t"])]
    assert tokenizer(" that").input_ids[1] == 258, "the file's own merge"
    assert tokenizer.chat_template == TEMPLATE
    assert read_json(teacher.folder / "generation_config.json") == {"bos_token_id": 256, "eos_token_id": [257]}
    monkeypatch.setattr("mohawkify.teacher.gguf.read_gguf", None)
    again = resolve_teacher(str(good))
    assert (again.folder, again.file_hashes) == (teacher.folder, teacher.file_hashes)
    assert resolve_teacher(str(teacher.folder)).file_hashes == teacher.file_hashes
    with (teacher.folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\0")
    with pytest.raises(TeacherError, match=r"has changed since it was read from the GGUF file"):
        _ = resolve_teacher(str(good)).file_hashes


def without(name: str) -> Change:
    def change(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        (metadata if name in metadata else tensors).pop(name)

    return change


def with_key(name: str, value: Any) -> Change:
    return lambda metadata, tensors: metadata.update({name: value})


def with_tensor(name: str, value: np.ndarray) -> Change:
    return lambda metadata, tensors: tensors.update({name: value})


NANS = np.full((32, 32), np.nan, np.float32)
DAMAGE: dict[str, tuple[Change, str]] = {
    "a tensor is missing": (without("blk.1.attn_q.weight"), r"lacks tensor blk.1.attn_q.weight"),
    "a tensor of another shape": (
        with_tensor("output_norm.weight", NANS[0, :16]),
        r"sizes \[16\], expected \[32\]",
    ),
    "a tensor too many": (with_tensor("blk.0.attn_q.bias", NANS[0]), r"\"blk.0.attn_q.bias\", for which .* no place"),
    "factors of another scaling": (
        with_tensor("rope_freqs.weight", np.arange(1, 9, dtype=np.float32)),
        "rope_freqs.weight, which are not the factors of Llama 3.1",
    ),
    "not finite": (
        with_tensor("blk.0.attn_output.weight", np.hstack([NANS, NANS])),
        "not finite in tensor blk.0",
    ),
    "another architecture": (with_key("general.architecture", "mamba"), "architecture 'mamba', expected llama, qwen2"),
    "an adapter": (with_key("general.type", "adapter"), "general.type is 'adapter'"),
    "one of several parts": (with_key("split.count", 3), "one of 3 parts"),
    "a key is missing": (without("llama.block_count"), "lacks llama.block_count"),
    "a key that nobody reads": (
        with_key("llama.rope.scaling.factor", 4.0),
        "rope.scaling.factor is 4.0, which",
    ),
    "experts": (with_key("llama.expert_count", 8), "llama.expert_count is 8"),
    "a key for every layer": (with_key("llama.feed_forward_length", [64, 64]), "llama.feed_forward_length is a list"),
    "a number of no meaning": (with_key("llama.rope.freq_base", float("nan")), "llama.rope.freq_base is nan"),
    "far too many layers": (with_key("llama.block_count", 10**9), "num_hidden_layers is .*, expected at most"),
    "no heads": (with_key("llama.attention.head_count", 0), "num_attention_heads is 0, expected at least 1"),
    "no tokenizer": (without("tokenizer.ggml.tokens"), "holds no tokenizer"),
    "another kind of tokenizer": (with_key("tokenizer.ggml.model", "bert"), "tokenizer.ggml.model is 'bert'"),
    "other rules of a tokenizer": (with_key("tokenizer.ggml.pre", "viking"), "tokenizer.ggml.pre is 'viking'"),
    "types of other tokens": (
        with_key("tokenizer.ggml.token_type", [1, 1]),
        "which do not fit its token_type",
    ),
    "a token twice": (with_key("tokenizer.ggml.tokens", ["a"] * 259), 'lists "a" twice'),
    "merges of other tokens": (with_key("tokenizer.ggml.merges", ["zz yy"]), "no usable tokenizer"),
    "an end beyond the tokens": (with_key("tokenizer.ggml.eos_token_id", 300), "259 tokens, but eos_token_id is 300"),
    "a vocabulary that does not fit": (
        with_key("llama.vocab_size", 300),
        r"sizes \[259, 32\], expected \[300, 32\]",
    ),
    "more tokens than rows": (
        lambda metadata, tensors: metadata.update(
            {
                "tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], "zz"],
                "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], 1],
                "llama.vocab_size": 259,
            }
        ),
        "lists 260 tokens, but its vocab_size is 259",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_model_of_transformers_is_refused_by_name(name, tmp_path, cache):
    change, expected = DAMAGE[name]
    file = write_gguf(tmp_path / "bad.gguf", change=change)
    line = refusal(file)
    assert str(file) in line
    assert re.search(expected, line), line
    assert not cache.exists() or not list(cache.iterdir())


def test_a_header_is_never_believed(good, tmp_path):
    whole = good.read_bytes()
    bad = tmp_path / "bad.gguf"

    def refused(content: bytes) -> str:
        bad.write_bytes(content)
        return refusal(bad)

    for length in (*range(4, 200, 7), *range(200, len(whole), 997), len(whole) - 1):
        assert "damaged or truncated" in refused(whole[:length]), length
    assert "is no GGUF file" in refused(b"")
    assert "is no GGUF file" in refused(b"GGML" + whole[4:])
    assert "git-lfs pointer" in refused(b"version https://git-lfs.github.com/spec/v1\n")
    assert "tensors end at byte" in refused(whole + bytes(64))
    assert "of version 1" in refused(whole[:4] + (1).to_bytes(4, "little") + whole[8:])
    assert "big-endian" in refused(whole[:4] + (3).to_bytes(4, "big") + whole[8:])
    for begin in (8, 16, 24):  # numbers of tensors and of keys, and the length of the first key
        for number in (2**63, 2**32, 2**22):
            assert "damaged" in refused(whole[:begin] + number.to_bytes(8, "little") + whole[begin + 8 :])


def test_random_damage_is_refused_or_a_model(good, tmp_path):
    whole, generator = bytearray(good.read_bytes()), np.random.default_rng(0)
    for trial in range(60):
        changed = bytearray(whole)
        for place in generator.integers(4, 2500 if trial % 2 else 12000, 2):
            changed[place] = generator.integers(256)
        bad = tmp_path / f"{trial}.gguf"
        bad.write_bytes(changed)
        with suppress(MohawkifyError):  # anything else is a bug
            resolve_teacher(str(bad))


def test_a_missing_package_is_named(good, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match="a teacher in a GGUF file needs gguf") as caught:
        resolve_teacher(str(good))
    assert caught.value.hint == 'pip install "mohawkify[gguf]"'


def test_a_cache_that_cannot_be_written_is_named(good, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"cannot write .*file/mohawkify/gguf/.*Not a directory") as caught:
        resolve_teacher(str(good))
    assert "XDG_CACHE_HOME names another place" in str(caught.value.hint)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    monkeypatch.setattr("mohawkify.files.disk.free_bytes", lambda folder: 10)
    with pytest.raises(DiskFullError, match="10 are free"):
        resolve_teacher(str(good))


def test_a_folder_or_repository_of_gguf_files_alone_says_to_name_one(good, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.Q8_0.gguf").write_bytes(good.read_bytes())
    with pytest.raises(TeacherError, match=r"GGUF only \(1 files\)") as caught:
        resolve_teacher(str(folder))
    assert caught.value.hint == f"name the file: {folder}/a.Q8_0.gguf"

    def missing(*arguments: Any) -> None:
        response: Any = SimpleNamespace(headers={}, request=None)
        raise RemoteEntryNotFoundError("404", response=response)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", missing)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda source: ["README.md", "b.gguf", "a.gguf"])
    with pytest.raises(TeacherError, match=r"some/thing holds its weights as GGUF only \(2 files\)") as caught:
        resolve_teacher("some/thing")
    assert caught.value.hint == "fetch one and name it: hf download some/thing a.gguf --local-dir ."
    with pytest.raises(TeacherError, match=r"there is no file .*none\.gguf"):
        resolve_teacher(str(tmp_path / "none.gguf"))


def test_a_folder_that_transformers_made_of_a_gguf_file_says_what_to_do(tmp_path):
    folder = make_teacher(tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "quantization_config": {"quant_method": "gguf"}})
    with pytest.raises(TeacherError, match="left it there when it read the model from a GGUF file") as caught:
        _ = resolve_teacher(str(folder)).tensors
    assert "name the .gguf file itself" in str(caught.value.hint)


@pytest.mark.full
def test_the_commands_take_a_gguf_file(tmp_path):
    model: Any = tiny_model("llama")
    file = write_gguf(tmp_path / "tiny.gguf", model=model, kind="Q8_0")
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"The cat {n} sat on the mat {n * n}." for n in range(60)))
    recipe = make_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("teacher:text.txt", str(text)))
    assert "tiny" in run_well("inspect", file).stdout
    run_well("plan", file, "--recipe", recipe)
    assert json.loads(run_well("doctor", file, "--json").stdout)["kind"] == "teacher in a GGUF file"
    run_well("data", "prepare", file, "--recipe", recipe, "--output", tmp_path / "prepared")
    done = run_well("convert", file, "--recipe", recipe, "--output", tmp_path / "run")
    assert "the teacher's weights were quantised (" in done.stderr
    recorded = read_json(tmp_path / "run" / "teacher.json")
    assert (recorded["source"], recorded["gguf"]["quantised"]) == (str(file), True)
    assert recorded["gguf"]["types"]["Q8_0"] == 15
    run_well("eval", tmp_path / "run")
    run_well("generate", tmp_path / "run", "The cat", "--teacher", "--max-tokens", 3)
    file.write_bytes(file.read_bytes()[:-1])
    refused = run("inspect", file)
    assert refused.exit_code == TeacherError.exit_code
    assert "damaged or truncated" in refused.stderr
