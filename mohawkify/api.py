"""The Python API: what the commands of the same names do, as functions.

A recipe is the name of a bundled one, the path of a .yaml file, a `Recipe`, or a `Budget` for which one is written;
overrides are texts such as ``stages.distill.tokens=5B``. A run is its folder; None means the newest finished run below
runs/. Every foreseeable failure is a `MohawkifyError`. ``report`` receives a line of text for every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohawkify.errors import UsageError, require_docstrings
from mohawkify.planning.rules import Budget
from mohawkify.recipe.loading import apply_overrides, load_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.run.folder import RunFolder, finished_run

if TYPE_CHECKING:
    from mohawkify.distributed.process_group import World
    from mohawkify.evaluation.dialogue import Dialogue
    from mohawkify.evaluation.evaluation import EvaluateOptions
    from mohawkify.evaluation.generation import GenerateOptions
    from mohawkify.exporters.llamba_import import ImportOptions
    from mohawkify.exporters.push import PushOptions
    from mohawkify.planning.planning import PlanOptions
    from mohawkify.train.conversion import ConvertOptions


require_docstrings()


def __getattr__(name: str) -> Any:
    """The options of the functions, imported on first use."""
    if name == "PlanOptions":
        from mohawkify.planning.planning import PlanOptions

        return PlanOptions
    if name == "ConvertOptions":
        from mohawkify.train.conversion import ConvertOptions

        return ConvertOptions
    if name == "EvaluateOptions":
        from mohawkify.evaluation.evaluation import EvaluateOptions

        return EvaluateOptions
    if name == "GenerateOptions":
        from mohawkify.evaluation.generation import GenerateOptions

        return GenerateOptions
    if name == "ImportOptions":
        from mohawkify.exporters.llamba_import import ImportOptions

        return ImportOptions
    if name == "PushOptions":
        from mohawkify.exporters.push import PushOptions

        return PushOptions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _ignore(line: str) -> None:
    """Drop a line."""


def inspect(teacher: str | Path) -> dict[str, Any]:
    """Describe a teacher part by part: what is replaced, copied and trained. No weights are read.

    Args:
        teacher: a Hub id, a folder or a config.json.

    Returns:
        The JSON object of `mohawkify inspect --json`.
    """
    from mohawkify.planning.inspection import inspect_source

    return inspect_source(str(teacher))


def plan(
    teacher: str | Path,
    recipe: str | Path | Recipe | Budget,
    overrides: Sequence[str] = (),
    options: PlanOptions | None = None,
) -> dict[str, Any]:
    """Plan a conversion: steps, FLOPs, memory, disk, time and cost. No weights are read.

    Args:
        teacher: a Hub id, a folder or a config.json.
        options: the machine, and whether activations are counted.

    Returns:
        The JSON object of `mohawkify plan --json`.
    """
    from mohawkify.planning.planning import PlanOptions
    from mohawkify.planning.planning import plan as plan_conversion

    options = options or PlanOptions()
    chosen = (
        write_recipe(teacher, recipe, overrides, options)
        if isinstance(recipe, Budget)
        else resolve_recipe(recipe, overrides)
    )
    return plan_conversion(str(teacher), chosen, options)


def write_recipe(
    teacher: str | Path, budget: Budget, overrides: Sequence[str] = (), options: PlanOptions | None = None
) -> Recipe:
    """Write a recipe for a teacher, so many tokens and a machine. No weights are read.

    Args:
        teacher: a Hub id, a folder or a config.json.
        budget: the tokens; a time is for `convert`, which measures.
        options: the machine; by default this one.

    Returns:
        The recipe; `mohawkify.recipe.loading.dump_recipe` makes YAML of it.
    """
    from mohawkify.planning.automatic import automatic_recipe
    from mohawkify.planning.planning import PlanOptions

    if budget.tokens is None:
        raise UsageError("found a time, expected tokens: how many a time allows is measured by convert alone")
    return automatic_recipe(str(teacher), budget, overrides, options or PlanOptions())


def convert(
    teacher: str | Path,
    recipe: str | Path | Recipe | Budget,
    overrides: Sequence[str] = (),
    options: ConvertOptions | None = None,
    world: World | None = None,
) -> RunFolder:
    """Convert a teacher into a student; the same call continues a run that was stopped.

    Args:
        teacher: a Hub id or a folder.
        options: the run's folder, and what does not change its result.
        world: the processes of the run, each of which makes the same call; None for this one alone.

    Returns:
        The finished run; ``run.final`` is the folder of the student, ``run.results()`` its metrics.
    """
    from mohawkify.train import trainer
    from mohawkify.train.conversion import ConvertOptions

    options = options or ConvertOptions()
    return trainer.convert(str(teacher), _chosen_recipe(teacher, recipe, overrides, options, world), options, world)


def tune(
    teacher: str | Path,
    recipe: str | Path | Recipe | Budget,
    overrides: Sequence[str] = (),
    options: ConvertOptions | None = None,
    world: World | None = None,
) -> dict[str, dict[str, Any]]:
    """Find the learning rates of a conversion's stages by range tests; `convert` with the same arguments goes on.

    Args:
        teacher: a Hub id or a folder.
        options: the run's folder, which then holds tuning.json and a picture of each range test.
        world: as in `convert`.

    Returns:
        The JSON object of `mohawkify tune --json`: by stage its ``learning_rate`` and the ``rates`` that were tried.
    """
    from mohawkify.train import trainer
    from mohawkify.train.conversion import ConvertOptions

    options = options or ConvertOptions()
    return trainer.tune(str(teacher), _chosen_recipe(teacher, recipe, overrides, options, world), options, world)


def _chosen_recipe(
    teacher: str | Path,
    recipe: str | Path | Recipe | Budget,
    overrides: Sequence[str],
    options: ConvertOptions,
    world: World | None,
) -> Recipe:
    from mohawkify.analysis.scoring import fixed
    from mohawkify.train.pace import written_recipe

    if isinstance(recipe, Budget):
        chosen = written_recipe(str(teacher), recipe, overrides, options, world)
    else:
        chosen = resolve_recipe(recipe, overrides)
    return fixed(str(teacher), chosen, options, world)


def score(
    teacher: str | Path,
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    layers: int | str | None = None,
    heads: str | None = None,
    options: ConvertOptions | None = None,
) -> dict[str, Any]:
    """Score a teacher's layers and heads by what their attention saves in a calibrated student.

    Args:
        teacher: a Hub id or a folder.
        layers: how many are chosen, or a share such as ``25%``; None for none.
        heads: the share that is chosen; None for none.
        options: the folder of the scores, and what receives every step.

    Returns:
        The content of scores.json.
    """
    from pydantic import ValidationError

    from mohawkify.analysis import scoring
    from mohawkify.recipe.schema import KeepRecipe
    from mohawkify.train.conversion import ConvertOptions

    wanted: dict[str, Any] = {} if layers is None else {"layers": "auto"}
    if layers is not None:
        wanted["share" if isinstance(layers, str) else "number"] = layers
    try:
        keep = KeepRecipe.model_validate(wanted | ({} if heads is None else {"heads": heads}))
    except ValidationError as error:
        expected = "layers as a number or a share such as 25%, and heads as a share such as 5%"
        raise UsageError(f"found {layers} for layers and {heads} for heads, expected {expected}") from error
    return scoring.score(str(teacher), resolve_recipe(recipe, overrides), keep, options or ConvertOptions())


def evaluate(
    run: str | Path | RunFolder | None = None,
    options: EvaluateOptions | None = None,
    report: Callable[[str], None] = _ignore,
) -> dict[str, Any]:
    """Measure a student against its teacher on held-out text, and on lm-eval tasks; writes eval.json into the run.

    Returns:
        The JSON object of `mohawkify eval --json`.
    """
    from mohawkify.distributed.device import choose_device
    from mohawkify.evaluation.evaluation import EvaluateOptions, evaluate_run

    chosen = resolve_run(run)
    device = choose_device(chosen.recipe().compute.device)
    return evaluate_run(chosen, options or EvaluateOptions(), device=device, report=report)


def export(
    run: str | Path | RunFolder | None,
    target: str,
    output: str | Path | None = None,
    dtype: str | None = None,
    report: Callable[[str], None] = _ignore,
) -> dict[str, Any]:
    """Write a student for other libraries; the export is loaded again and compared with the run.

    Args:
        target: ``hf``, ``mlx``, ``mlx-q8``, ``mlx-q4``, ``mamba2``, ``mamba2-mlx-q8`` or ``mamba2-mlx-q4``.
        output: a new or empty folder; None for ``exports/<target>`` in the run.
        dtype: ``bfloat16`` (the default) or ``float32``.

    Returns:
        The JSON object of `mohawkify export --json`; ``directory`` is the export's folder.
    """
    from mohawkify.exporters.export import export_run

    path = resolve_run(run).path
    folder = path / "exports" / target if output is None else Path(output)
    return export_run(path, target, folder, dtype=dtype, report=report)


def generate(
    run: str | Path | RunFolder | None,
    prompt: str,
    options: GenerateOptions | None = None,
    on_text: Callable[[str, str], None] = lambda name, text: None,
    with_teacher: bool = False,
) -> dict[str, str]:
    """Continue a prompt with a run's student, and with its teacher on request. No chat template is applied.

    Args:
        options: length and sampling.
        with_teacher: whether the teacher continues the prompt too.
        on_text: receives ``student`` or ``teacher`` and a piece of text: first the prompt, then new text as it comes.

    Returns:
        The new text by model, ``teacher`` first.
    """
    from mohawkify.distributed.device import choose_device
    from mohawkify.evaluation.evaluation import load_run_models, run_teacher
    from mohawkify.evaluation.generation import GenerateOptions, read_on, remember, write_on
    from mohawkify.student.saved_state import ReadText, load_state, model_hash, require_new_file, save_state

    chosen, options = resolve_run(run), options or GenerateOptions()
    if with_teacher and (options.save_state or options.load_state):
        raise UsageError("found a saved state and the teacher, which has no state", hint="leave the teacher out")
    if options.save_state is not None:
        require_new_file(options.save_state)
    teacher = run_teacher(chosen) if with_teacher else None
    models, tokenizer = load_run_models(chosen, teacher, choose_device(chosen.recipe().compute.device))
    texts = {}
    for name, model in models.items():
        read = ReadText()
        if options.load_state is not None:
            read = load_state(options.load_state, model, model_hash(chosen.final))
        read = read_on(model, tokenizer, read, prompt)
        if options.save_state is not None:
            remember(model, read)
            save_state(options.save_state, read, model_hash(chosen.final))
        on_text(name, prompt)
        texts[name] = write_on(
            model,
            tokenizer,
            read,
            options,
            lambda text, name=name: on_text(name, text),  # type: ignore[misc]
        )
    return texts


def chat(
    run: str | Path | RunFolder | None = None, options: GenerateOptions | None = None, system: str | None = None
) -> Dialogue:
    """Begin a conversation with a run's student, or go on with a saved one.

    Args:
        options: length and sampling of every answer; ``load_state`` is the saved conversation.
        system: instructions in front of the conversation.

    Returns:
        A `Dialogue`: ``reply(text)`` returns an answer, ``save(path)`` keeps the conversation, ``reset()`` forgets it.
    """
    from mohawkify.distributed.device import choose_device
    from mohawkify.evaluation.dialogue import Dialogue
    from mohawkify.evaluation.evaluation import load_run_models
    from mohawkify.evaluation.generation import GenerateOptions
    from mohawkify.student.saved_state import model_hash

    chosen = resolve_run(run)
    models, tokenizer = load_run_models(chosen, None, choose_device(chosen.recipe().compute.device))
    options = options or GenerateOptions()
    return Dialogue(models["student"], tokenizer, model_hash(chosen.final), options, system)


def serve(
    run: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    report: Callable[[str], None] = _ignore,
) -> None:
    """Serve a student to OpenAI-style clients until the process is stopped.

    Args:
        run: a run, or the folder of an export.
        port: 0 takes any that is free; ``report`` receives the address.
    """
    from mohawkify.serving.served import find_served
    from mohawkify.serving.served import serve as serve_model

    serve_model(find_served(None if run is None else Path(run)), host, port, report)


def push(export: str | Path | None, options: PushOptions, report: Callable[[str], None] = _ignore) -> dict[str, Any]:
    """Show what an export would be on the Hugging Face Hub, or upload it.

    Args:
        export: a folder that `export` wrote; None for the only one of the newest run.
        options: the repository, the licence, and whether anything is sent.

    Returns:
        The JSON object of `mohawkify push --json`.
    """
    from mohawkify.exporters.push import push_export

    return push_export(None if export is None else Path(export), options, report)


def import_checkpoint(
    checkpoint: str | Path, options: ImportOptions, report: Callable[[str], None] = _ignore
) -> RunFolder:
    """Make a run of a Llamba checkpoint.

    Args:
        checkpoint: a folder or a Hub id.
        options: the run's folder, recipe and teacher.
    """
    from mohawkify.exporters.llamba_import import import_llamba

    return import_llamba(str(checkpoint), options, report)


def resolve_recipe(recipe: str | Path | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a name, a path or a `Recipe`, with overrides applied; raises RecipeError."""
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return apply_overrides(loaded, tuple(overrides))


def resolve_run(run: str | Path | RunFolder | None) -> RunFolder:
    """The finished run of a folder, or the newest one; raises UsageError."""
    return finished_run(run.path if isinstance(run, RunFolder) else run if run is None else Path(run))
