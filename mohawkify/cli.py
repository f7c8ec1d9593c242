"""The command line: parse, call, print. Data goes to standard output, everything else to standard error.

Nothing heavy is imported before a verb runs, so that help and completion come at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import click
from click.shell_completion import CompletionItem, get_completion_class

from mohawkify import __version__, cli_show
from mohawkify.cli_errors import Verbs
from mohawkify.errors import INPUT, UsageError

NAME = "mohawkify"
COMPLETION_VARIABLE = "_MOHAWKIFY_COMPLETE"
FOLDER = click.Path(path_type=Path)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def _recipe_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from mohawkify.shelf import recipe_names

    return [CompletionItem(name) for name in recipe_names() if name.startswith(incomplete)]


recipe_option = click.option(
    "--recipe",
    "recipe_name",
    required=True,
    metavar="RECIPE",
    shell_complete=_recipe_names,
    help="A bundled recipe (`mohawkify recipes ls`), or the path of a .yaml file.",
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one value of the recipe, such as stages.distill.tokens=5B. May be given again.",
)
teacher_moved = click.option(
    "--teacher",
    "teacher_source",
    metavar="TEACHER",
    help="Where the teacher is now; by default where it was when the run was made.",
)


class FiniteRange(click.FloatRange):
    """A number in a range; nan is in none, though click lets it pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or a refusal."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


@click.group(cls=Verbs, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name=NAME)
@click.pass_context
def main(context: click.Context) -> None:
    """Turn a pretrained Transformer into a recurrent model.

    TEACHER is a model on the Hugging Face Hub, a local folder or, for inspect and plan, a config.json; `demo` is the
    little teacher that comes along. RUN is a folder written by convert; without one, the newest finished run below
    runs/ is meant. Results go to standard output, everything else to standard error. The exit code is 0 when done, 2
    when it cannot be done as asked, 64 to 75 by what went wrong; docs/reliability.md has the list.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command()
@click.argument("teacher")
@as_json
def inspect(teacher: str, as_json: bool) -> None:
    """Show layer by layer what is grafted, copied, learned.

    No weights are loaded; TEACHER may be a config.json. The student shown is one of default sizes.
    """
    with _working():
        from mohawkify.cli_inspect import inspect_source

        found = inspect_source(teacher)
    _print(found, cli_show.inspection_text, as_json)


@main.command()
@click.argument("teacher")
@recipe_option
@set_option
@click.option(
    "--flops-per-second",
    type=FiniteRange(min=1, max=1e30),
    metavar="X",
    help="Sustained speed of the whole machine, such as 4e14; by default one is assumed for the device.",
)
@as_json
def plan(
    teacher: str, recipe_name: str, overrides: tuple[str, ...], flops_per_second: float | None, as_json: bool
) -> None:
    """Dry run: steps, tokens, memory, disk, FLOPs, time.

    Everything is worked out from configuration and recipe, memory and time as estimates. No weights are loaded;
    TEACHER may be a config.json.
    """
    recipe = _recipe(recipe_name, overrides)
    with _working():
        from mohawkify import pipeline

        planned = pipeline.plan(teacher, recipe, flops_per_second=flops_per_second)
    _print(planned, cli_show.plan_text, as_json)


@main.command()
@click.argument("teacher")
@recipe_option
@click.option("--output", type=FOLDER, metavar="DIR", help="The run's folder; by default runs/ and the student's name.")
@set_option
@click.option(
    "--data",
    metavar="PATH",
    help="Train on this file, folder or glob instead of the recipe's text; without --validation its end is held out.",
)
@click.option("--validation", metavar="PATH", help="Measure on this text instead of the recipe's held-out text.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="auto: continue what the same command began; never: insist on a fresh folder.",
)
@click.option(
    "--patience",
    type=FiniteRange(min=0),
    default=1800.0,
    show_default=True,
    metavar="SECONDS",
    help="End with exit code 75 and all stacks after so long without progress in training; 0: never.",
)
@click.option(
    "--disk-wait",
    type=FiniteRange(min=0),
    default=0.0,
    show_default=True,
    metavar="SECONDS",
    help="Where the disk is full at a checkpoint, wait so long for space before giving up.",
)
@click.option(
    "--track",
    type=click.Choice(["tensorboard", "trackio", "wandb"]),
    multiple=True,
    help="Send the figures to a tracker as well. May be given again.",
)
@click.option(
    "--track-project",
    default="mohawkify",
    show_default=True,
    metavar="NAME",
    help="The project in which trackers show the run.",
)
def convert(
    teacher: str,
    recipe_name: str,
    output: Path | None,
    overrides: tuple[str, ...],
    data: str | None,
    validation: str | None,
    resume: str,
    patience: float,
    disk_wait: float,
    track: tuple[str, ...],
    track_project: str,
) -> None:
    """Turn a teacher into a student, in three stages.

    Orient, align, distill, each followed by a comparison with the teacher on held-out text. Stop it at any time; the
    same command continues it. Prints the run's folder.
    """
    recipe = _recipe(recipe_name, (*_own_text(data, validation), *overrides))
    with _working():
        from mohawkify import pipeline

        run = pipeline.convert(
            teacher,
            recipe,
            output=output,
            resume=resume,
            report=_say,
            patience=patience,
            disk_wait=disk_wait,
            track=track,
            track_project=track_project,
        )
    click.echo(str(run.path))


def _own_text(data: str | None, validation: str | None) -> list[str]:
    """Overrides for text of the user's own; with it, the recipe's held-out text no longer fits."""
    sources: dict[str, list[dict[str, str]]] = {}
    if data is not None:
        sources = {"train": [{"path": data}], "validation": []}
    if validation is not None:
        sources["validation"] = [{"path": validation}]
    # JSON is YAML: a path stays one value whatever signs are in it.
    return [f"data.{key}={json.dumps(value)}" for key, value in sources.items()]


@main.command()
@click.argument("teacher")
@recipe_option
@click.option(
    "--for",
    "for_source",
    metavar="TEACHER",
    help="The teacher that is converted: its tokenizer and folder give the text; by default the one that is asked.",
)
@click.option(
    "--stage-phase",
    type=click.Choice(["finish", "train"]),
    default="finish",
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
    help="How many of the likeliest tokens are kept; the rest is kept as one number.",
)
@click.option("--output", type=FOLDER, metavar="DIR", help="By default teacher-logits/ and the teacher's name.")
@click.option("--bits", type=click.Choice(["8", "4"]), help="Take the teacher's weights in so many bits.")
@set_option
@as_json
def teach(
    teacher: str,
    recipe_name: str,
    for_source: str | None,
    stage_phase: str,
    data: str | None,
    top_k: int,
    output: Path | None,
    bits: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Keep a teacher's likeliest next tokens on disk.

    For every token of the text that a phase of the recipe's stage 3 reads, so that `convert` can learn from a teacher
    that is not there: stages.distill.finish.logits names the folder. Stop it at any time; the same command continues
    it. Prints the folder.
    """
    text = [] if data is None else _own_text(data, None)
    if data is not None and stage_phase == "finish":
        text = [f"data.finish={json.dumps([{'path': data}])}"]
    recipe = _recipe(recipe_name, (*text, *overrides))
    with _working():
        from mohawkify.pipeline import choose_device
        from mohawkify.teach import teach as ask
        from mohawkify.teacher.locate import teacher_name
        from mohawkify.train.world import join_world

        with join_world() as world:
            done = ask(
                teacher,
                recipe,
                phase=stage_phase,
                for_source=for_source,
                top_k=top_k,
                output=output or Path("teacher-logits") / teacher_name(teacher),
                bits=None if bits is None else int(bits),
                device=choose_device(recipe.compute.device),
                world=world,
                report=_say if world.is_main else _ignore,
            )
            if not world.is_main:
                return
    click.echo(json.dumps(done, indent=2) if as_json else done["folder"])


@main.command("eval")
@click.argument("run", required=False, type=FOLDER)
@click.option(
    "--against",
    type=click.Choice(["teacher", "none"]),
    default="teacher",
    show_default=True,
    help="What the student is compared with.",
)
@click.option("--tasks", metavar="NAMES", help="lm-eval tasks by name or YAML path, with commas between.")
@click.option("--preset", metavar="NAME", help="A set of lm-eval tasks: llamba.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N questions of each task.")
@click.option("--shots", type=click.IntRange(min=0), metavar="N", help="Examples in front of each question.")
@click.option("--include-path", type=FOLDER, metavar="DIR", help="A folder with lm-eval tasks of your own.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Questions per forward pass."
)
@teacher_moved
@as_json
def evaluate(run: Path | None, as_json: bool, **wanted: Any) -> None:
    """Measure a student against its teacher.

    Perplexity, KL(teacher || student) and top-1 agreement on the run's held-out text, and lm-eval tasks. Also writes
    eval.json and eval.md into the run.
    """
    from mohawkify.run import finished_run

    chosen = finished_run(run)
    with _working():
        from mohawkify.evaluate.report import console_table
        from mohawkify.evaluate.run import evaluate_run
        from mohawkify.pipeline import choose_device

        device = choose_device(chosen.recipe().compute.device)
        found = evaluate_run(chosen, **wanted, device=device, report=_say)
    _print(found, console_table, as_json)


@main.command()
@click.argument("run", required=False, type=FOLDER)
@click.option("--target", required=True, metavar="TARGET", help="hf, mlx, mlx-q8 or mlx-q4.")
@click.option(
    "--output", type=FOLDER, metavar="DIR", help="A new or empty folder; by default exports/TARGET in the run."
)
@click.option("--dtype", metavar="DTYPE", help="bfloat16 (the default) or float32.")
@as_json
def export(run: Path | None, target: str, output: Path | None, dtype: str | None, as_json: bool) -> None:
    """Write a student for transformers or mlx-lm.

    The export is loaded again and compared with the run before it is kept. Prints the folder.
    """
    from mohawkify.run import finished_run

    chosen = finished_run(run)
    with _working():
        from mohawkify.export.export import export_run

        done = export_run(chosen.path, target, output or chosen.path / "exports" / target, dtype=dtype, report=_say)
    _say(f"{target}: {done['bytes']:,} bytes, {done['kl']:.2g} nats per token from the run")
    click.echo(json.dumps(done, indent=2) if as_json else done["directory"])


@main.command()
@click.argument("words", nargs=-1, required=True, metavar="[RUN] PROMPT")
@click.option("--teacher", "with_teacher", is_flag=True, help="Let the teacher continue the prompt too.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="The most tokens to write."
)
@click.option(
    "--temperature", type=FiniteRange(min=0), default=0.0, show_default=True, help="0: always the likeliest token."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the drawn tokens.")
def generate(words: tuple[str, ...], with_teacher: bool, max_tokens: int, temperature: float, seed: int) -> None:
    """Continue PROMPT with a run's student.

    The text is printed as it comes; no chat template is put around the prompt.
    """
    from mohawkify.run import finished_run

    if len(words) > 2:
        raise UsageError(f"found {len(words)} arguments, expected [RUN] PROMPT", hint="put the prompt into quotes")
    chosen = finished_run(Path(words[0]) if len(words) == 2 else None)
    with _working() as output:
        from mohawkify.evaluate.run import load_run_models, teacher_folder
        from mohawkify.generate import write_text
        from mohawkify.pipeline import choose_device

        def show(text: str) -> None:
            click.echo(text, file=output, nl=False)

        device = choose_device(chosen.recipe().compute.device)
        teacher = teacher_folder(chosen) if with_teacher else None
        models, tokenizer = load_run_models(chosen, teacher, device)
        for name, model in models.items():
            show(f"{name}: {words[-1]}" if with_teacher else words[-1])
            write_text(
                model, tokenizer, words[-1], max_tokens=max_tokens, temperature=temperature, seed=seed, on_text=show
            )
            show("\n")


@main.command()
@click.option(
    "--output", type=FOLDER, default="runs/demo-mohawk", show_default=True, metavar="DIR", help="The run's folder."
)
def demo(output: Path) -> None:
    """The whole way on the demo teacher, in minutes.

    Inspects, plans, converts, measures, exports to hf and mlx-q4, and lets teacher and student tell a story. Run
    again, it continues where it was stopped, or measures and exports once more.
    """
    with _working():
        from mohawkify.showcase import run_demo

        summary = run_demo(output, report=_say)
    click.echo(summary)


@main.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """The recipes that come along: ls, show, cp."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@recipes.command("ls")
@as_json
def recipes_ls(as_json: bool) -> None:
    """List the bundled recipes."""
    from mohawkify.recipe import load_recipe
    from mohawkify.shelf import recipe_names

    found = [
        {"name": name, "description": load_recipe(name).description, "teacher": load_recipe(name).teacher}
        for name in recipe_names()
    ]
    _print({"recipes": found}, cli_show.recipes_text, as_json)


@recipes.command("show")
@click.argument("name", shell_complete=_recipe_names)
def recipes_show(name: str) -> None:
    """Print a bundled recipe."""
    from mohawkify.shelf import recipe_text

    click.echo(recipe_text(name), nl=False)


@recipes.command("cp")
@click.argument("name", shell_complete=_recipe_names)
@click.argument("file", type=FOLDER)
def recipes_cp(name: str, file: Path) -> None:
    """Copy a bundled recipe to FILE, to make it your own; an existing file is never replaced."""
    from mohawkify.shelf import recipe_text
    from mohawkify.storage import write_text

    text = recipe_text(name)
    if os.path.isdir(file):  # Path.is_dir raises for a name that is too long
        file = file / f"{name}.yaml"
    if file.exists() or file.is_symlink():
        raise UsageError(f"{file} exists already", hint="choose another name")
    write_text(file, text)
    click.echo(str(file))


@main.command()
@as_json
def families(as_json: bool) -> None:
    """List the families of teachers that can be converted."""
    from mohawkify.shelf import adapter_names, load_adapter

    details = {}
    for name in adapter_names():
        adapter = load_adapter(name)
        details[name] = {"title": adapter.title, "examples": list(adapter.examples), "odd": list(adapter.odd)}
    _print({"families": list(details), "details": details}, cli_show.families_text, as_json)


@main.command()
@as_json
@click.argument("folder", required=False, type=FOLDER)
def doctor(folder: Path | None, as_json: bool) -> None:
    """Say what is installed and what is missing, or whether a folder is sound.

    Without FOLDER: for each missing extra what it would bring, and the command that installs it. With a teacher, a run,
    a checkpoint or an export as FOLDER: whether every byte is as it was written and what a command would refuse;
    nothing in it is run. The exit code is then 0 where it is sound and 66 where not.
    """
    if folder is not None:
        from mohawkify.verdict import judge

        found = judge(folder)
        _print(found, cli_show.verdict_text, as_json)
        if not found["sound"]:
            raise SystemExit(INPUT)
        return
    from mohawkify.doctor import examine

    _print(examine(), cli_show.doctor_text, as_json)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion script.

    For example, in ~/.bashrc: eval "$(mohawkify completion bash)"
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    click.echo(kind(main, {}, NAME, COMPLETION_VARIABLE).source())


def _recipe(name: str, overrides: tuple[str, ...]) -> Any:
    from mohawkify.recipe import apply_overrides, load_recipe

    return apply_overrides(load_recipe(name), overrides)


def _working() -> AbstractContextManager[TextIO]:
    from mohawkify.cli_quiet import quiet_libraries

    return quiet_libraries()


def _say(line: str) -> None:
    click.echo(line, err=True)


def _ignore(line: str) -> None:
    """What the processes beside the main one say."""


def _print(found: dict[str, Any], as_text: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    click.echo(json.dumps(found, indent=2, allow_nan=False) if as_json else as_text(found))
