"""Running commands in tests, and a tiny teacher with a recipe that takes seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from mohawkify.cli.main import main
from tests.bytes_tokenizer import BOS, EOS, bytes_tokenizer
from tests.tiny import save_teacher, tiny_teacher

RECIPE = """
name: tiny
description: a few steps of every stage
student: {init: attention, state_size: 8}
data:
  train: [{path: "teacher:text.txt"}]
stages:
  orient: {tokens: 128, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
  align: {tokens: 128, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
  distill: {tokens: 192, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
compute: {precision: fp32, device: cpu}
evaluation: {tokens: 200, sequence_length: 32, batch_sequences: 2}
"""


def run(*arguments: Any) -> Result:
    """Run a command as the terminal would, with standard output and standard error apart."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_well(*arguments: Any) -> Result:
    """Run a command that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def make_teacher(folder: Path, **changes: Any) -> Path:
    """Write a random Llama with a tokenizer of bytes, and text beside it."""
    save_teacher(
        tiny_teacher("llama", **{"vocab_size": 258, "bos_token_id": BOS, "eos_token_id": EOS, **changes}), folder
    )
    bytes_tokenizer().save_pretrained(folder)
    stories = [f"The cat {number} sat on the mat {number * number}." for number in range(60)]
    (folder / "text.txt").write_text("<|endoftext|>".join(stories))
    return folder


def make_recipe(folder: Path) -> Path:
    """Write the recipe."""
    file = folder / "tiny.yaml"
    file.write_text(RECIPE)
    return file


def copy_of(teacher: Path, folder: Path) -> Path:
    """A copy of a teacher that a test may damage."""
    shutil.copytree(teacher, folder)
    return folder
