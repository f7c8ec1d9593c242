"""A tokenizer is made of its folder's own files, and by no class that could do more than that."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from mohawkify.errors import TeacherError
from mohawkify.teacher.no_remote_code import never_ask
from mohawkify.teacher.tokenizer import load_tokenizer
from mohawkify.teacher.tokenizer_files import text_hashes, tokenizer_files
from tests.bytes_tokenizer import BOS, EOS, bytes_tokenizer
from tests.teacher.damage import config, edit_json, swap_ids, tokenizer, tokenizer_config
from tests.tiny import tiny_config

ROWS = 258


class Ear:
    """Hears what Python opens while it listens."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.is_listening = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_listening and event == "open" and isinstance(arguments[0], (str, bytes)):
            self.opened.append(os.path.abspath(os.fsdecode(arguments[0])))


EAR = Ear()


@pytest.fixture(scope="module")
def whole_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material") / "teacher"
    bytes_tokenizer().save_pretrained(folder)
    tiny_config("llama", vocab_size=ROWS, bos_token_id=BOS, eos_token_id=EOS).save_pretrained(folder)
    load_tokenizer(folder, ROWS)  # what is imported once does not count
    return folder


@pytest.fixture
def folder(whole_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy to spoil, beside it another tokenizer, whose vocabulary lies in the current folder too."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "outside"):
        shutil.copytree(whole_tokenizer, tmp_path / name)
    tokenizer(swap_ids)(tmp_path / "outside")
    vocabulary = json.dumps({"a": 0, "b": 1, "<s>": 2, "</s>": 3})
    for place in (tmp_path, tmp_path / "outside"):
        (place / "vocab.json").write_text(vocabulary)
        (place / "merges.txt").write_text("#version: 0.2\n")
    EAR.opened.clear()
    EAR.is_listening = True
    yield tmp_path / "teacher"
    EAR.is_listening = False
    other = [path for path in EAR.opened if path.startswith(str(tmp_path)) and "/teacher/" not in path]
    assert not [path for path in other if path.endswith((".json", ".txt"))], "read outside its folder"


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name",
    [
        *("AutoProcessor", "AutoModelForCausalLM", "AutoTokenizer", "AutoTokenizerFast", "AutoConfig"),
        *("GenerationConfig", "RagTokenizer", "BertJapaneseTokenizer", "PreTrainedTokenizerBase", "pipeline", "models"),
        *(5, ["LlamaTokenizer"], True),
    ],
    ids=str,
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_class_that_does_more_than_read_tokens(folder: Path, file: str, name: object) -> None:
    edit_json(folder / file, tokenizer_class=name)
    with pytest.raises(TeacherError, match=f"{file} says tokenizer_class is"):
        load_tokenizer(folder, ROWS)


@pytest.mark.parametrize(
    "name", ["TokenizersBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer", "../x.X", "TheirTokenizer"]
)
def test_classes_that_read_a_tokenizer_or_are_ignored(folder: Path, name: str) -> None:
    tokenizer_config(tokenizer_class=name)(folder)
    config(tokenizer_class="../tokenization_x.X")(folder)
    assert load_tokenizer(folder, ROWS).get_vocab() == bytes_tokenizer().get_vocab()


def test_transformers_never_asks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever route leads there; whoever is asked says yes."""
    write(folder, "processor_config.json", {"auto_map": {"AutoProcessor": "evil.Evil"}})
    (folder / "evil.py").write_text(f"open({str(folder / 'CANARY')!r}, 'w').close()\nclass Evil: pass\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    never_ask()
    with pytest.raises(ValueError, match="custom code"):
        AutoProcessor.from_pretrained(folder, local_files_only=True)
    assert not asked
    assert not (folder / "CANARY").exists()


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file", "gguf_file", "vocab", "merges", "x"])
@pytest.mark.parametrize("absolute", [True, False])
def test_special_tokens_name_no_files(folder: Path, key: str, absolute: bool) -> None:
    target = folder.parent / "outside" / "tokenizer.json" if absolute else "../outside/tokenizer.json"
    write(folder, "special_tokens_map.json", {key: str(target)})
    with pytest.raises(TeacherError, match=r"special_tokens_map.json has .*expected special tokens alone"):
        load_tokenizer(folder, ROWS)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "TokenizersBackend"])
@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("place", ["outside/", "../outside/", "", "/"])
def test_names_of_files_in_the_settings_are_not_followed(
    folder: Path, kind: str, is_whole: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the current folder, relative to its own, and absolute: the folder's own vocabulary, or none."""
    place = f"{folder.parent}/outside/" if place == "/" else place
    names = {"vocab": "vocab.json", "vocab_file": "vocab.json", "merges": "merges.txt", "merges_file": "merges.txt"}
    names |= {"tokenizer_file": "tokenizer.json", "gguf_file": "tokenizer.json", "spm_file": "vocab.json"}
    tokenizer_config(tokenizer_class=kind, **{key: place + name for key, name in names.items()})(folder)
    if not is_whole:
        (folder / "tokenizer.json").unlink()
        with pytest.raises(TeacherError, match="no usable tokenizer"):
            load_tokenizer(folder, ROWS)
        return
    assert load_tokenizer(folder, ROWS + 2).get_vocab()["a"] == bytes_tokenizer().get_vocab()["a"]


BAD_FILES: dict[str, tuple[str, object, str]] = {
    "special tokens are a list": ("special_tokens_map.json", [], "expected a JSON object"),
    "special token is a number": ("special_tokens_map.json", {"bos_token": 5}, "expected a token"),
    "special token with an argument": (
        "special_tokens_map.json",
        {"bos_token": {"content": "<s>", "tokenizer_file": "x"}},
        "expected a token",
    ),
    "added tokens are a list": ("added_tokens.json", ["x"], "expected a JSON object"),
    "added token without a number": ("added_tokens.json", {"x": "y"}, "expected a whole number"),
    "added token below zero": ("added_tokens.json", {"x": -1}, "expected a whole number"),
    "arguments": ("tokenizer_config.json", {"init_inputs": ["/etc/hostname"]}, "init_inputs"),
    "other configuration": (
        "config.json",
        {"model_type": "llama", "configuration_files": ["config.json", "../outside/config.4.0.0.json"]},
        "configuration_files",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_say_more_than_tokens(folder: Path, case: str) -> None:
    name, content, says = BAD_FILES[case]
    write(folder, name, content)
    with pytest.raises(TeacherError, match=says):
        load_tokenizer(folder, ROWS)


@pytest.mark.parametrize(
    "name", ["special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/x.jinja"]
)
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(TeacherError, match="is no file"):
        load_tokenizer(folder, ROWS)


def test_links_are_found_at_any_depth(folder: Path) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "inside").symlink_to(folder / "tokenizer.json")
    load_tokenizer(folder, ROWS)
    (folder / "a" / "b" / "out").symlink_to("/etc")
    with pytest.raises(TeacherError, match="leads out of the folder"):
        load_tokenizer(folder, ROWS)


def test_published_tokenizers_pass(folder: Path) -> None:
    """Special tokens in all the spellings there are, tokens of other modalities, leftovers of another machine."""
    token = {"content": "<s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {"bos_token": token, "eos_token": "</s>", "additional_special_tokens": ["<s>"], "image_token": "</s>"}
    write(folder, "special_tokens_map.json", {**special, "pad_token": None})
    tokenizer_config(tokenizer_file="/home/somebody/tokenizer.json", special_tokens_map_file="/home/x.json")(folder)
    tokenizer_config(fast_tokenizer_files=["tokenizer.json"], init_inputs=[])(folder)
    found = load_tokenizer(folder, ROWS)
    assert (found.bos_token_id, found.eos_token_id) == (BOS, EOS)


def test_the_files_that_decide_what_a_tokenizer_does(folder: Path) -> None:
    write(folder, "special_tokens_map.json", {})
    (folder / "chat_template.jinja").write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("x")
    assert [path.relative_to(folder).as_posix() for path in tokenizer_files(folder)] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    ]
    (folder / "generation_config.json").write_text("{}")
    (folder / "spiece.model").write_text("x")
    assert text_hashes(folder).keys() == {
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "generation_config.json",
        "spiece.model",
    }
