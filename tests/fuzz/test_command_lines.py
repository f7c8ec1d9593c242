"""Any command line: what was asked for, or one line of error and the exit code that goes with it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import click

from mohawkify.cli.main import main
from mohawkify.recipe.messages import keys
from mohawkify.recipe.schema import Recipe
from tests.commands import RECIPE, run
from tests.fuzz.campaign import run_campaign
from tests.fuzz.folders import inside
from tests.fuzz.mutate import PATHS, WORDS, odd_value, render
from tests.tiny import tiny_config

CODES = {0, 2, 64, 65, 66, 69, 71, 73, 74}
HOME = "@HOME@"  # stands for the folder of the test, which has another name every time
PLACES = (f"{HOME}/config.json", f"{HOME}/broken.json", f"{HOME}/r.yaml", f"{HOME}", f"{HOME}/empty", f"{HOME}/new/er")
NAMES = (
    "nowhere",
    "some/model",
    "a/b/c",
    "Some/Model.json",
    "x.yaml",
    "",
    "-",
    "--",
    "-x",
    "é",
    "a b",
    "llama",
    ":",
    "*",
)
NUMBERS = (
    "0",
    "-1",
    "1",
    "2",
    "1e9",
    "1e-320",
    "nan",
    "inf",
    "-inf",
    "9" * 30,
    "9" * 5000,
    "1_0",
    "٣",
    "",
    "x",
    "0x1",
    "1.5",
)
SEVERAL = {"2", "1_0", "٣"}  # numbers that --processes takes
CHEAP = {"inspect", "plan", "recipes", "families", "completion"}  # these may be given what they can work on
SLOW = {"bench", "demo"}  # these need nothing to work on, for minutes: their help alone is asked for
KEYS = [key.name.replace("N", "0") for key in keys(Recipe)]


def draw(rng: Random) -> bytes:
    """A command line made from what click declares; heavy commands are only given what they must refuse."""
    arguments: list[str] = []
    command: click.Command = main
    while isinstance(command, click.Group):
        if rng.random() < 0.02:
            break
        name = rng.choice([*command.commands, *(name for name in command.commands if name in CHEAP)] * 5 + [*NAMES[:3]])
        arguments.append(name)
        if name not in command.commands:
            break
        command = command.commands[name]
    if command.name == "doctor" and rng.random() < 0.8:
        arguments, command = ["inspect"], main.commands["inspect"]
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            if rng.random() < 0.9:
                arguments += [_value(rng, arguments[0], parameter) for _ in range(rng.choice((1, 1, 1, 1, 2)))]
        elif rng.random() < (0.9 if parameter.required else 0.3):
            arguments += _option(rng, arguments[0] if arguments else "", parameter)
    if rng.random() < 0.05:
        arguments.insert(
            rng.randrange(len(arguments) + 1), rng.choice((*NAMES, "--help", "-h", "--version", "--debug"))
        )
    if next((argument for argument in arguments if not argument.startswith("-")), "") in SLOW:
        arguments.append("--help")
    return json.dumps(arguments).encode()


def _option(rng: Random, name: str, parameter: click.Parameter) -> list[str]:
    flag = rng.choice(parameter.opts)
    if getattr(parameter, "is_flag", False):
        return [flag] if rng.random() < 0.9 else [f"{flag}=x"]
    values = [_value(rng, name, parameter) for _ in range(rng.choice((1, 1, 2)) if parameter.multiple else 1)]
    return [part for value in values for part in ([f"{flag}={value}"] if rng.random() < 0.3 else [flag, value])]


def _value(rng: Random, name: str, parameter: click.Parameter) -> str:
    if parameter.name == "processes":  # real ones speak for themselves, past the runner that collects what is said
        text = rng.choice([number for number in NUMBERS if number not in SEVERAL])
    elif rng.random() < 0.1:
        text = rng.choice((*NUMBERS, *PATHS, *WORDS, "x" * 5000, "a\udcffb"))
    elif isinstance(parameter.type, click.Choice):
        text = rng.choice((*parameter.type.choices, "other", ""))
    elif isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType):
        text = rng.choice(NUMBERS)
    elif parameter.name == "recipe_name":
        # A plan of the published recipes is four seconds of honest work: the memory of 4,096 tokens is counted.
        shipped = ("demo", "stories") if name == "plan" else ("demo", "stories", "llamba-1b")
        text = rng.choice((*shipped, f"{HOME}/r.yaml", f"{HOME}/r.yaml", *PLACES, *NAMES))
    elif parameter.name == "overrides":
        value = rng.choice((rng.choice(WORDS), render(odd_value(rng)), rng.choice(NUMBERS), "null"))
        text = f"{rng.choice(KEYS)}={value}"
    elif parameter.name == "name" and name == "recipes":
        text = rng.choice(("demo", "stories", *NAMES))
    elif name in CHEAP and parameter.name == "teacher":
        text = rng.choice((f"{HOME}/config.json", f"{HOME}/config.json", "demo", *PLACES, *NAMES))
    else:
        text = rng.choice((f"{HOME}/empty", f"{HOME}/broken.json", "nowhere", f"{HOME}/new", *NAMES))
    return text.replace("\0", "")


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Make a folder the current one for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def test_any_command_line(folder: Path) -> None:
    home = folder / "outer" / "home"
    (home / "empty").mkdir(parents=True)
    (home / "config.json").write_text(json.dumps(tiny_config("llama").to_dict(), default=str))
    (home / "broken.json").write_text('{"model_type": "llama", "hidden_size": -1}')
    (home / "r.yaml").write_text(RECIPE)
    for warm in (
        ["doctor"],
        ["inspect", str(home / "config.json")],
        ["plan", "demo", "--recipe", str(home / "r.yaml")],
    ):
        assert run(*warm).exit_code == 0

    def check(case: bytes) -> None:
        arguments = [argument.replace(HOME, str(home)) for argument in json.loads(case)]
        with working_in(home), inside(folder, only_written=True):
            result = run(*arguments)
        _assert_clean(arguments, result)

    run_campaign("command-lines", 120, draw, check, most_seconds=3.0)


def _assert_clean(arguments: list[str], result: Any) -> None:
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    shown = f"{' '.join(errors)[:80]} (exit code {result.exit_code}) for {str(arguments)[:300]}: {result.stderr[-500:]}"
    assert result.exit_code in CODES, shown
    # doctor says what is wrong with a folder on standard output.
    is_verdict = arguments[0:1] == ["doctor"] and not errors
    assert is_verdict or len(errors) == (0 if result.exit_code == 0 else 1), shown
    assert "--debug" in arguments or "Traceback" not in result.stderr, shown
