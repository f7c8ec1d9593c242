"""The command line: parse, call, print. Data goes to standard output, everything else to standard error.

Nothing heavy is imported before a command runs, so that help and completion come at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from mohawkify import __version__
from mohawkify.cli import tables
from mohawkify.cli.bench_commands import bench
from mohawkify.cli.chat_commands import chat
from mohawkify.cli.data_commands import data as data_commands
from mohawkify.cli.data_commands import prepared_option
from mohawkify.cli.error_lines import CommandGroup
from mohawkify.cli.import_commands import import_checkpoint
from mohawkify.cli.logits_commands import cache_logits
from mohawkify.cli.options import (
    FOLDER,
    FiniteRange,
    as_json,
    budget_recipe_option,
    device_of,
    own_text,
    print_line,
    print_result,
    processes_option,
    recipe_or_budget,
    set_option,
    setting,
    time_option,
    tokens_option,
)
from mohawkify.cli.push_commands import push
from mohawkify.cli.quiet import quiet_libraries
from mohawkify.cli.recipe_commands import recipes
from mohawkify.cli.score_commands import score
from mohawkify.cli.serve_commands import serve
from mohawkify.cli.short_imports import paused_collector
from mohawkify.cli.tune_command import tune
from mohawkify.errors import INPUT, UsageError, harmless, require_docstrings

NAME = "mohawkify"
COMPLETION_VARIABLE = "_MOHAWKIFY_COMPLETE"


@click.group(cls=CommandGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name=NAME)
@click.pass_context
def main(context: click.Context) -> None:
    """Turn a pretrained Transformer into a recurrent model.

    TEACHER is a model on the Hugging Face Hub, a local folder, a GGUF file or, for inspect and plan, a config.json;
    `demo` is the small teacher that comes with mohawkify. RUN is a folder written by convert; without one, the newest
    finished run below runs/ is used. Results go to standard output, everything else to standard error. The exit code is
    0 when done, 2 when it cannot be done as asked, 64 to 75 by what went wrong; docs/reliability.md has the list.
    """
    require_docstrings()
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command()
@click.argument("teacher")
@as_json
def inspect(teacher: str, as_json: bool) -> None:
    """Show layer by layer what is replaced, copied, trained.

    No weights are loaded; TEACHER may be a config.json. A GGUF file is read at its first use, once. The student shown
    is one of default sizes.
    """
    with paused_collector(), quiet_libraries():
        from mohawkify import api

        described = api.inspect(teacher)
    print_result(described, tables.inspection_text, as_json)


@main.command()
@click.argument("teacher")
@budget_recipe_option
@tokens_option
@set_option
@click.option("--gpu", metavar="NAME", help="Plan for H100, H200, A100 or 4090; by default for this machine.")
@click.option("--gpus", "num_gpus", type=click.IntRange(min=1), default=1, show_default=True, help="How many of them.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "single", "deepspeed", "fsdp"]),
    default="auto",
    show_default=True,
    help="What spreads the training over GPUs; auto: the recipe's, or nothing for one and DeepSpeed for several.",
)
@click.option(
    "--zero",
    type=click.IntRange(0, 3),
    metavar="0-3",
    help="Stage of ZeRO with DeepSpeed; by default the recipe's, or 3.",
)
@click.option(
    "--utilisation",
    type=FiniteRange(min=0.001, max=1),
    default=0.3,
    show_default=True,
    metavar="X",
    help="Part of a GPU's peak arithmetic that is sustained: an assumption.",
)
@click.option(
    "--flops-per-second",
    type=FiniteRange(min=1, max=1e30),
    metavar="X",
    help="Sustained speed of everything together, such as 4e14, instead of an assumption.",
)
@click.option(
    "--price-per-hour",
    type=FiniteRange(min=0, max=1e9),
    metavar="X",
    help="What one GPU costs per hour, in your money; without it no cost is planned.",
)
@click.option(
    "--output", type=FOLDER, metavar="DIR", help="Where the run will lie: compare the disk with what is free."
)
@as_json
def plan(
    teacher: str,
    recipe_name: str | None,
    tokens: int | None,
    overrides: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Dry run: steps, FLOPs, memory, disk, time, cost.

    Everything is computed from configuration and recipe; all but steps and tokens are estimates, explained in
    docs/plan.md. No weights are loaded and no GPU is needed; TEACHER may be a config.json.
    """
    recipe = recipe_or_budget(recipe_name, overrides, tokens)
    with paused_collector(), quiet_libraries():
        from mohawkify import api
        from mohawkify.cli.plan_tables import plan_text

        own = () if recipe_name else overrides
        planned = api.plan(teacher, recipe, own, options=api.PlanOptions(**options, count=True))
    print_result(planned, plan_text, as_json)


@main.command()
@click.argument("teacher")
@budget_recipe_option
@tokens_option
@time_option
@click.option("--output", type=FOLDER, metavar="DIR", help="The run's folder; by default runs/ and the student's name.")
@set_option
@click.option(
    "--data",
    metavar="PATH",
    help="Train on this file, folder or glob instead of the recipe's text; without --validation its end is held out.",
)
@click.option("--validation", metavar="PATH", help="Measure on this text instead of the recipe's held-out text.")
@prepared_option
@processes_option
@click.option(
    "--engine",
    type=click.Choice(["auto", "single", "deepspeed", "fsdp"]),
    help="What holds weights and optimiser, instead of the recipe's compute.engine.",
)
@click.option("--zero", type=click.IntRange(0, 3), help="Stage of DeepSpeed's ZeRO, instead of the recipe's.")
@click.option(
    "--offload",
    type=click.Choice(["none", "optimizer", "all"]),
    help="What is kept in the CPU's memory, instead of the recipe's setting.",
)
@click.option("--deepspeed-config", type=FOLDER, metavar="FILE", help="A JSON file of further settings for DeepSpeed.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="auto: continue what the same command began; never: require a fresh folder.",
)
@click.option(
    "--hang-timeout",
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
    help="Send the metrics to a tracker as well. May be given again.",
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
    recipe_name: str | None,
    tokens: int | None,
    seconds: float | None,
    output: Path | None,
    overrides: tuple[str, ...],
    data: str | None,
    validation: str | None,
    processes: int | None,
    engine: str | None,
    zero: int | None,
    offload: str | None,
    deepspeed_config: Path | None,
    resume: str,
    hang_timeout: float,
    disk_wait: float,
    prepared: Path,
    track: tuple[str, ...],
    track_project: str,
) -> None:
    """Turn a teacher into a student, in stages.

    With --tokens or --time instead of --recipe, a recipe is written for the teacher, the budget and this machine; it is
    printed, and lies in the run as recipe.yaml. Its learning rates are found when the stages begin.

    Calibrate, orient, align, distill, as far as the recipe has them, each followed by a comparison with the teacher on
    held-out text. Stop it at any time; the same command continues it, also in another number of processes or on another
    engine. Prints the run's folder.
    """
    wanted = {
        "engine": engine,
        "zero": zero,
        "offload": offload,
        "deepspeed_config": deepspeed_config and str(deepspeed_config),
    }
    compute = [setting(f"compute.{key}", value) for key, value in wanted.items() if value is not None]
    if engine in ("single", "fsdp") and zero is None:
        compute.append("compute.zero=null")  # the recipe's is for DeepSpeed
    settings = (*own_text(data, validation), *compute, *overrides)
    recipe = recipe_or_budget(recipe_name, settings, tokens, seconds)
    with quiet_libraries():
        from mohawkify.cli.ranks import joined, start_processes

        start_processes(processes)
        with joined(device_of(recipe, settings)) as world:
            from mohawkify import api

            options = api.ConvertOptions(
                output, resume, hang_timeout, disk_wait, prepared, track, track_project, print_line
            )
            run = api.convert(teacher, recipe, () if recipe_name else settings, options=options, world=world)
    if world.is_rank0:
        click.echo(str(run.path))


main.add_command(tune)
main.add_command(cache_logits)


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
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Examples in front of each question.")
@click.option("--include-path", type=FOLDER, metavar="DIR", help="A folder with lm-eval tasks of your own.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Questions per forward pass."
)
@click.option("--speed", is_flag=True, help="Also time how many tokens per second are generated.")
@click.option("--validation", metavar="PATH", help="Measure on this text instead of the run's held-out text.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Another value of data.validation or evaluation, such as evaluation.tokens=50k. May be given again.",
)
@click.option(
    "--teacher",
    "teacher_source",
    metavar="TEACHER",
    help="Where the teacher is now; by default where it was when the run was made.",
)
@as_json
def evaluate(
    run: Path | None, as_json: bool, validation: str | None, overrides: tuple[str, ...], **options: Any
) -> None:
    """Measure a student against its teacher.

    Perplexity, KL(teacher || student) and top-1 agreement on the run's held-out text, and lm-eval tasks. Also writes
    eval.json and eval.md into the run.
    """
    with quiet_libraries():
        from mohawkify import api
        from mohawkify.evaluation.report import console_table

        chosen = api.EvaluateOptions(**options, overrides=(*own_text(None, validation), *overrides))
        results = api.evaluate(run, chosen, print_line)
    print_result(results, console_table, as_json)


@main.command()
@click.argument("run", required=False, type=FOLDER)
@click.option(
    "--target",
    required=True,
    metavar="TARGET",
    help="hf, mlx, mlx-q8, mlx-q4, mamba2, mamba2-mlx-q8, mamba2-mlx-q4 or llamba.",
)
@click.option(
    "--output", type=FOLDER, metavar="DIR", help="A new or empty folder; by default exports/TARGET in the run."
)
@click.option("--dtype", metavar="DTYPE", help="bfloat16 (the default) or float32.")
@as_json
def export(run: Path | None, target: str, output: Path | None, dtype: str | None, as_json: bool) -> None:
    """Write a student for transformers, mlx-lm or, as mamba2, for engines that load no code.

    The export is loaded again and compared with the run before it is kept. Prints the folder.
    """
    with quiet_libraries():
        from mohawkify import api

        done = api.export(run, target, output, dtype, print_line)
    print_line(f"{target}: {done['bytes']:,} bytes, {done['kl']:.2g} nats per token from the run on {done['text']}")
    click.echo(json.dumps(done, indent=2) if as_json else done["directory"])


@main.command()
@click.argument("words", nargs=-1, required=True, metavar="[RUN] PROMPT")
@click.option("--teacher", "with_teacher", is_flag=True, help="Continue the prompt with the teacher too.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="The most tokens to write."
)
@click.option(
    "--temperature", type=FiniteRange(min=0), default=0.0, show_default=True, help="0: always the most probable token."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the sampling.")
@click.option("--save-state", type=FOLDER, metavar="FILE", help="Keep what the student remembers of the prompt.")
@click.option("--load-state", type=FOLDER, metavar="FILE", help="Go on with a text that was kept, by the same run.")
def generate(words: tuple[str, ...], with_teacher: bool, **options: Any) -> None:
    """Continue PROMPT with a run's student.

    The text is printed as it comes; no chat template is put around the prompt.
    """
    if len(words) > 2:
        raise UsageError(f"found {len(words)} arguments, expected [RUN] PROMPT", hint="put the prompt into quotes")
    run = Path(words[0]) if len(words) == 2 else None
    started: list[str] = []
    with quiet_libraries() as output:
        from mohawkify import api

        def show(name: str, text: str) -> None:
            if name not in started:
                click.echo(("\n" if started else "") + (f"{name}: " if with_teacher else ""), file=output, nl=False)
                started.append(name)
            click.echo(harmless(text) if output.isatty() else text, file=output, nl=False)

        api.generate(run, words[-1], api.GenerateOptions(**options), show, with_teacher)
        click.echo(file=output)


main.add_command(import_checkpoint)
main.add_command(chat)
main.add_command(serve)
main.add_command(push)
main.add_command(score)


@main.command()
@click.option(
    "--output", type=FOLDER, default="runs/demo-mohawk", show_default=True, metavar="DIR", help="The run's folder."
)
def demo(output: Path) -> None:
    """The whole way on the demo teacher, in minutes.

    Inspects, plans, converts, measures, exports to hf and mlx-q4, and generates a story with teacher and student. Run
    again, it continues where it was stopped, or measures and exports once more.
    """
    with quiet_libraries():
        from mohawkify.cli.showcase import run_demo

        summary = run_demo(output, report=print_line)
    click.echo(summary)


main.add_command(data_commands)


main.add_command(recipes)


@main.command()
@as_json
def families(as_json: bool) -> None:
    """List the families of teachers that can be converted."""
    from mohawkify.families.registry import adapter_names, load_adapter

    details = {}
    for name in adapter_names():
        adapter = load_adapter(name)
        details[name] = {"title": adapter.title, "examples": list(adapter.examples), "notes": list(adapter.notes)}
    print_result({"families": list(details), "details": details}, tables.families_text, as_json)


main.add_command(bench)


@main.command()
@as_json
@click.argument("folder", required=False, type=FOLDER)
def doctor(folder: Path | None, as_json: bool) -> None:
    """Check the installation, or check a folder.

    Without FOLDER: for each missing extra what it would bring, and the command that installs it. With a teacher (a GGUF
    file too), a run, a checkpoint, an export, prepared text or teacher logits as FOLDER: whether every byte is as it
    was written and what a command would refuse; nothing in it is run. The exit code is then 0 if it is valid and 66 if
    not.
    """
    if folder is not None:
        from mohawkify.doctor.check_folder import check_folder

        checked = check_folder(folder)
        print_result(checked, tables.folder_text, as_json)
        if not checked["valid"]:
            raise SystemExit(INPUT)
        return
    from mohawkify.doctor.installed import check_installation

    print_result(check_installation(), tables.doctor_text, as_json)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion script.

    For example, in ~/.bashrc: eval "$(mohawkify completion bash)"
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    click.echo(kind(main, {}, NAME, COMPLETION_VARIABLE).source())
