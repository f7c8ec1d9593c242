"""The command that writes a teacher's most probable next tokens to disk."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mohawkify.cli.data_commands import prepared_option
from mohawkify.cli.options import (
    FOLDER,
    as_json,
    chosen_recipe,
    own_text,
    print_line,
    processes_option,
    recipe_option,
    set_option,
    setting,
)
from mohawkify.cli.quiet import quiet_libraries


@click.command("cache-logits")
@click.argument("teacher")
@recipe_option
@click.option(
    "--for",
    "for_source",
    metavar="TEACHER",
    help="The teacher that is converted: its tokenizer and folder give the text; by default the same.",
)
@click.option(
    "--stage-phase",
    type=click.Choice(["final_phase", "train"]),
    default="final_phase",
    show_default=True,
    help="Which text of the recipe's stage 3.",
)
@click.option("--data", metavar="PATH", help="This file, folder or glob instead of the recipe's text of that phase.")
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="K",
    help="How many of the most probable tokens are kept; the rest is summed up.",
)
@click.option("--output", type=FOLDER, metavar="DIR", help="By default teacher-logits/ and the teacher's name.")
@click.option("--bits", type=click.Choice(["8", "4"]), help="Load the teacher's weights in so many bits.")
@prepared_option
@processes_option
@set_option
@as_json
def cache_logits(
    teacher: str,
    recipe_name: str,
    for_source: str | None,
    stage_phase: str,
    data: str | None,
    top_k: int,
    output: Path | None,
    bits: str | None,
    prepared: Path,
    processes: int | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a teacher's most probable next tokens to disk.

    For every token of the text that a phase of the recipe's stage 3 reads, so that `convert` can learn from a teacher
    that is not loaded: stages.distill.final_phase.logits names the folder. Stop it at any time; the same command
    continues it. Prints the folder.
    """
    text = [] if data is None else own_text(data, None)
    if data is not None and stage_phase == "final_phase":
        text = [setting("data.final_phase", [{"path": data}])]
    recipe = chosen_recipe(recipe_name, (*text, *overrides))
    with quiet_libraries():
        from mohawkify.cli.ranks import joined, start_processes

        start_processes(processes)
        with joined(recipe.compute.device) as world:
            from mohawkify.distributed.device import choose_device
            from mohawkify.teacher.locate import teacher_name
            from mohawkify.train.cache_logits import CacheOptions
            from mohawkify.train.cache_logits import cache_logits as write_logits

            options = CacheOptions(
                output or Path("teacher-logits") / teacher_name(teacher),
                stage_phase,
                for_source,
                top_k,
                bits=None if bits is None else int(bits),
                prepared=prepared,
                report=print_line if world.is_rank0 else lambda line: None,
            )
            done = write_logits(teacher, recipe, options, choose_device(recipe.compute.device), world)
    if world.is_rank0:
        click.echo(json.dumps(done, indent=2) if as_json else done["folder"])
