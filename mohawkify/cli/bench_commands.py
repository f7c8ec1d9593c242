"""The commands of `bench`: errors first, then speed and memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mohawkify.cli.error_lines import CommandGroup
from mohawkify.files.atomic import ensure_writable, write_json, write_text

Options = Callable[[Callable[..., None]], Callable[..., None]]


def _shared(function: Callable[..., None]) -> Callable[..., None]:
    """The options of every benchmark."""
    options: list[Options] = [
        click.option("--quick", is_flag=True, help="Tiny sizes, for a first look: its metrics say little."),
        click.option(
            "--output",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Also write JSON, Markdown and plots into this folder.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON for programs."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.group(cls=CommandGroup, invoke_without_command=True)
@click.pass_context
def bench(context: click.Context) -> None:
    """Measure speed and memory: ops, train, decode.

    Errors come first: where a result is wrong no speed is reported, and the exit code is 65. Every measure that
    docs/performance.md promises is printed with what was found, hit or missed.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@bench.command()
@_shared
def ops(quick: bool, output: Path | None, as_json: bool) -> None:
    """Every operator, beside its definition and its peers.

    Peers that are installed (transformers' own Mamba-2, mamba-ssm, flash-linear-attention, liger-kernel) are given the
    same tensors.
    """

    def run(device: Any) -> dict[str, Any]:
        from mohawkify.bench.operators import bench_operators

        return bench_operators(device, quick=quick, report=_say)

    _bench("ops", run, output, as_json)


@bench.command()
@click.argument("teacher", default="demo")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences per step.")
@click.option("--length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per sequence.")
@_shared
def train(teacher: str, batch: int, length: int, quick: bool, output: Path | None, as_json: bool) -> None:
    """A step of each stage, beside its definition.

    TEACHER is a model on the Hub or a local folder; by default the demo's.
    """

    def run(device: Any) -> dict[str, Any]:
        from mohawkify.bench.training import bench_training

        sizes = {"batch": 2, "length": 64} if quick else {"batch": batch, "length": length}
        return bench_training(teacher, device, **sizes, quick=quick, report=_say)

    _bench("train", run, output, as_json)


@bench.command()
@_shared
def decode(quick: bool, output: Path | None, as_json: bool) -> None:
    """Decoding, a student beside its teacher and its cache.

    Over batch sizes and over contexts, with random weights: 100 million parameters on a CPU, a billion on a GPU. What
    does not fit into memory is a result.
    """

    def run(device: Any) -> dict[str, Any]:
        from mohawkify.bench.decoding import bench_decoding

        return bench_decoding(device, quick=quick, report=_say)

    _bench("decode", run, output, as_json)


def _bench(name: str, run: Callable[[Any], dict[str, Any]], output: Path | None, as_json: bool) -> None:
    from mohawkify.cli.quiet import quiet_libraries

    if output is not None:
        ensure_writable(output)  # a benchmark takes minutes
    with quiet_libraries():
        from mohawkify.bench.markdown import curves, markdown
        from mohawkify.bench.measure import machine
        from mohawkify.distributed.device import choose_device
        from mohawkify.evaluation.line_plot import line_plot

        device = choose_device("auto")
        found = {"bench": name, "machine": machine(device), **run(device)}
        page = markdown(name, found)
        if output is not None:
            write_json(output / f"{name}.json", found)
            write_text(output / f"{name}.md", page)
            for file, (x_label, y_label, points) in curves(name, found).items():
                write_text(output / f"{file}.svg", line_plot(x_label, y_label, points))
    click.echo(json.dumps(found, indent=2, allow_nan=False) if as_json else page)


def _say(line: str) -> None:
    click.echo(line, err=True)
