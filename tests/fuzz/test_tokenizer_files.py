"""Any files of a tokenizer: one that is whole, or one line that says what is wrong; nothing else is opened."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mohawkify.errors import CheckpointError, TeacherError
from mohawkify.teacher.tokenizer import load_tokenizer
from tests.bytes_tokenizer import BOS, EOS, bytes_tokenizer
from tests.fuzz.campaign import require_message, run_campaign
from tests.fuzz.mutate import PATHS, mutate_bytes, mutate_json, render
from tests.tiny import tiny_config

ROWS = 258
TOKEN = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
CLASSES = ("TokenizersBackend", "LlamaTokenizer", "GPT2Tokenizer", "AutoProcessor", "AutoTokenizer", "x.X", "")
NAMES = ("tokenizer_file", "vocab_file", "merges_file", "gguf_file", "vocab", "merges", "spm_file", "chat_template")
opened: list[str] = []
is_listening = False


def layer_hooks(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what Python opens or starts while an input is judged."""
    if is_listening and event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(os.path.abspath(os.fsdecode(arguments[0])))
    elif is_listening and event in ("subprocess.Popen", "os.system", "socket.connect", "pickle.find_class"):
        opened.append(event)


@pytest.fixture
def tokenizer_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A whole tokenizer, and beside it files that must not be read."""
    global is_listening
    sys.addaudithook(layer_hooks)
    monkeypatch.chdir(folder)
    home = folder / "teacher"
    bytes_tokenizer().save_pretrained(home)
    tiny_config("llama", vocab_size=ROWS, bos_token_id=BOS, eos_token_id=EOS).save_pretrained(home)
    (folder / "outside").write_text("{}")
    for kind in CLASSES[:3]:  # what is imported once does not count
        (home / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        load_tokenizer(home, ROWS + 2)
    yield home
    is_listening = False


def draw(rng: Random, whole: dict[str, Any]) -> bytes:
    """Some of the files, changed, as one JSON object of texts by their names."""
    settings = {**whole["tokenizer_config.json"], "tokenizer_class": rng.choice(CLASSES)}
    for _ in range(rng.choice((0, 0, 1, 2))):
        settings[rng.choice(NAMES)] = rng.choice((*PATHS, "../outside", "outside", "tokenizer.json", "config.json"))
    contents = {
        "tokenizer.json": whole["tokenizer.json"],
        "tokenizer_config.json": settings,
        "special_tokens_map.json": {"bos_token": TOKEN, "additional_special_tokens": ["</s>", TOKEN]},
        "added_tokens.json": {"<s>": BOS, "</s>": EOS},
    }
    chosen = rng.sample(list(contents), rng.choice((1, 1, 2)))
    files: dict[str, str] = {}
    for name, content in contents.items():
        if name in chosen:
            text = render(mutate_json(rng, content)).encode("utf-8", "surrogatepass")
            files[name] = (mutate_bytes(rng, text) if rng.random() < 0.2 else text).decode("latin-1")
        elif rng.random() < 0.7:
            files[name] = json.dumps(content)
    return json.dumps(files).encode()


def test_any_tokenizer(tokenizer_folder: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json")
    whole = {name: json.loads((tokenizer_folder / name).read_bytes()) for name in names}
    own = [str(tokenizer_folder), sys.prefix, sys.base_prefix, *sys.path, "/dev/null", "/dev/urandom"]

    def check(case: bytes) -> None:
        global is_listening
        files = json.loads(case)
        for name in (*names, "special_tokens_map.json", "added_tokens.json"):
            (tokenizer_folder / name).unlink(missing_ok=True)
        for name, text in files.items():
            (tokenizer_folder / name).write_bytes(text.encode("latin-1"))
        opened.clear()
        is_listening = True
        try:
            found = load_tokenizer(tokenizer_folder, ROWS)
        except (TeacherError, CheckpointError) as error:  # the second for what is not strict JSON
            require_message(error)
            return
        finally:
            is_listening = False
            strange = [path for path in opened if not path.startswith(tuple(filter(None, own)))]
            assert not strange, f"opened {strange}"
        ids = found("The cat sat.", add_special_tokens=False)["input_ids"]
        assert all(0 <= number < ROWS for number in ids)

    run_campaign("tokenizer-files", 400, lambda rng: draw(rng, whole), check)
