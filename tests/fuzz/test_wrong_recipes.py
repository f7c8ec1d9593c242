"""Every key of a recipe made wrong in every way: one line of error that names file and line, and exit code 64."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mohawkify.recipe.loading import dump_recipe, parse_recipe
from mohawkify.recipe.messages import keys
from mohawkify.recipe.schema import Recipe
from tests.commands import run

EVERY_KEY = """\
name: every-key
description: every key of the schema
teacher: nowhere
student:
  {name: small, init: attention, keep: {layers: auto, number: 1, heads: 5%, scores: s.json, window: 9}, write: decay,
   conv_activation: silu, gated_norm: true}
data:
  train: [{path: a.txt, weight: 2, where: [{column: score, operator: ">=", value: 4.0}]}]
  final_phase: [{hub: some/chats, name: default, split: test, revision: main, chat: messages, loss: all}]
  validation: [{demo: validation}]
stages:
  orient: {tokens: 80M, sequence_length: 128, batch_sequences: 8, learning_rate: 1e-4}
  align:
    {tokens: 80M, sequence_length: 128, batch_sequences: 8, learning_rate: 1e-4,
     plateau: {window: 1M, threshold: 0.01}}
  distill:
    {tokens: 80M, sequence_length: 128, batch_sequences: 8, learning_rate: 1e-4,
     final_phase: {tokens: 1M, sequence_length: 64, teacher: somewhere, teacher_bits: 8}}
evaluation: {every_tokens: 1M}
compute: {micro_batch_sequences: 4, threads: 1, zero: 2, offload: none, deepspeed_config: d.json}
"""
# The keys that cannot stand beside the others.
OTHERS = {
    "teacher: somewhere, teacher_bits: 8": "logits: kept",
    "init: attention": "begin: runs/first",
    "number: 1": "share: 25%",
}
WITH_LOGITS = re.sub("|".join(OTHERS), lambda match: OTHERS[match[0]], EVERY_KEY)
LEAF = re.compile(r"^( *(?:- )?)(\w+): (\S.*)$")
# No key takes any of these.
VALUES = ("{x: 1}", ".nan", "!!python/name:os.system 1", "&a 1", "*a", "[{x: 1}]", "[[]]")
NUMBER = re.compile(r"^[-0-9.e]+$")


def wrong_recipes(text: str) -> Iterator[tuple[str, int]]:
    """Recipes with one mistake, and the line of the mistake, from 1."""
    lines = text.splitlines()
    for index, line in enumerate(lines):
        match = LEAF.match(line)
        if match is None:
            continue
        start, key, value = match.groups()
        is_number = NUMBER.match(value) or value in ("true", "false") or value.startswith("[")
        for wrong in VALUES:
            yield "\n".join([*lines[:index], f"{start}{key}: {wrong}", *lines[index + 1 :]]), index + 1
        if is_number and key != "value":  # a condition's value may be text
            yield "\n".join([*lines[:index], f"{start}{key}: '{value}!'", *lines[index + 1 :]]), index + 1
        yield "\n".join([*lines[:index], f"{start}{key}_x: {value}", *lines[index + 1 :]]), index + 1
        twice = f"{' ' * len(start)}{key}: {value}"
        yield "\n".join([*lines[: index + 1], twice, *lines[index + 1 :]]), index + 2


def test_every_mistake_is_named_with_its_line(tmp_path: Path) -> None:
    text, with_logits = (dump_recipe(parse_recipe(recipe, "every.yaml")) for recipe in (EVERY_KEY, WITH_LOGITS))
    file = tmp_path / "r.yaml"
    mutations = list(wrong_recipes(text))
    assert len(mutations) >= 300
    mutations += [
        (wrong, line)
        for wrong, line in wrong_recipes(with_logits)
        if any(key.split(":")[0] in wrong.splitlines()[line - 1] for key in OTHERS.values())
    ]
    for mutation, line in mutations:
        file.write_text(mutation)
        result = run("plan", "nowhere", "--recipe", file)
        shown = f"{mutation.splitlines()[line - 1]!r}: {result.stderr}"
        assert result.exit_code == 64, shown
        errors = [each for each in result.stderr.splitlines() if each.startswith("error: ")]
        assert len(errors) == 1, shown
        assert f"{file}:{line}: " in errors[0], shown
        assert "Traceback" not in result.stderr


def test_every_key_of_the_schema_is_among_them() -> None:
    text = "".join(dump_recipe(parse_recipe(recipe, "every.yaml")) for recipe in (EVERY_KEY, WITH_LOGITS))
    written = {match[2] for line in text.splitlines() if (match := LEAF.match(line))}
    assert {key.name.rpartition(".")[2] for key in keys(Recipe)} <= written
