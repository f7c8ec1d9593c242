"""From a teacher and a recipe to scores: a calibrated student, its hybrids measured, and the choice for a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mohawkify.analysis.heat_map import heat_map
from mohawkify.analysis.hybrid import Hybrids, fits_of
from mohawkify.analysis.score import FORMAT, LONG, Heads, Memo, Sizes, rank
from mohawkify.data.stage_text import stage_ranges
from mohawkify.data.validation import evaluation_batches
from mohawkify.distributed.process_group import World
from mohawkify.distributed.shutdown import Shutdown
from mohawkify.errors import RecipeError, UsageError
from mohawkify.files.atomic import read_json, write_text
from mohawkify.recipe.schema import CalibrateRecipe, KeepRecipe, Recipe, StudentRecipe
from mohawkify.run.folder import RUNS
from mohawkify.student.keep import caches_of, choose, design_layers, is_open, share_of
from mohawkify.student.student_spec import cache_elements
from mohawkify.teacher.resolve import resolve_teacher
from mohawkify.text_tables import markdown_table
from mohawkify.train.calibrate import batches_of_passes, calibrate, calibration_text
from mohawkify.train.conversion import Conversion, ConvertOptions
from mohawkify.train.loop import StepReport
from mohawkify.train.preparation import prepare, read_request
from mohawkify.train.progress import StageProgress
from mohawkify.train.trainer import train

FILE = "scores.json"


def score(teacher: str, recipe: Recipe, keep: KeepRecipe, options: ConvertOptions) -> dict[str, Any]:
    """Score a teacher's layers and heads; the same call goes on where it was stopped.

    Args:
        teacher: a Hub id or a folder.
        recipe: text, mixers and calibration; its other stages are not run. The student is measured on its held-out
            text.
        keep: how much is to be chosen: ``layers: auto`` with a number or share, a share of ``heads``, or both.
        options: the folder, and what receives the steps.

    Returns:
        The content of scores.json; scores.svg and scores.md lie beside it.
    """
    world = World()
    request = read_request(teacher, _calibration_only(recipe), options, world)
    with Shutdown() as stop, request.locked():
        conversion = prepare(request)
        if conversion is None:
            raise UsageError(f"{request.run.path} holds a finished run", hint="choose another --output")
        spec, family = request.teacher.spec, request.teacher.adapter
        layers, heads = spec.num_hidden_layers, spec.num_attention_heads

        def cached(kept: Heads) -> int:
            pairs = tuple((layer, head) for layer, numbers in kept.items() for head in numbers)
            student = StudentRecipe(mixer=recipe.student.mixer, keep=KeepRecipe(heads=pairs))
            return cache_elements(caches_of(design_layers(spec, family, student), spec), LONG)

        sizes = Sizes(layers, heads, *_wanted(keep, layers, heads))
        facts = {"teacher": spec.source, "identity": conversion.identity, "num_layers": layers, "num_heads": heads}
        memo = Memo(conversion.run.path / FILE, facts, conversion.options.report)
        if "table" in memo.data and memo.data["sizes"] == asdict(sizes):
            return memo.data
        train(conversion, stop)
        found = rank(_hybrids(conversion, stop), sizes, memo, cached)
    write_text(conversion.run.path / "scores.md", table_of(found))
    svg = heat_map(f"KL saved by attention: {spec.source}", found["heads"]["estimated"], found["layers"]["saved"])
    write_text(conversion.run.path / "scores.svg", svg)
    return found


def fixed(teacher: str, recipe: Recipe, options: ConvertOptions, world: World | None) -> Recipe:
    """The recipe with the layers and heads that it leaves to scores, which are made where it names none.

    Raises:
        UsageError: they would have to be made in several processes.
        RecipeError: the file is none of scores, of another shape, or has too few.
    """
    keep = recipe.student.keep
    if not is_open(keep):
        return recipe
    resolved = resolve_teacher(teacher)
    layers, heads = resolved.spec.num_hidden_layers, resolved.spec.num_attention_heads
    if keep.scores is not None:
        found = read_scores(Path(keep.scores), layers, heads)
    elif world is not None and world.size > 1:
        raise UsageError(
            "student.keep: found layers or heads to be chosen, expected scores where several processes convert",
            hint="mohawkify score TEACHER --recipe RECIPE, and name its file in student.keep.scores",
        )
    else:
        run = options.output or RUNS / (recipe.student.name or f"{resolved.name}-mohawk")
        folder = run.with_name(f"{run.name}-scores")
        found = score(teacher, recipe, keep, ConvertOptions(output=folder, report=options.report))
    kept_layers, kept_heads = choose(keep, layers, heads, found)
    options.report(f"keeping layers {list(kept_layers)} and heads {[list(head) for head in kept_heads]}")
    chosen = KeepRecipe(layers=kept_layers, heads=kept_heads, window=keep.window)
    student = recipe.student.model_copy(update={"keep": chosen})
    return recipe.model_copy(update={"student": student})


def read_scores(path: Path, layers: int, heads: int) -> dict[str, Any]:
    """The scores of a file; raises RecipeError."""
    found = read_json(path) if path.is_file() else None
    if not isinstance(found, dict) or found.get("format") != FORMAT or "table" not in found:
        raise RecipeError(
            f"student.keep.scores: {path} holds no finished scores", hint="`mohawkify score` writes scores.json"
        )
    if (found["num_layers"], found["num_heads"]) != (layers, heads):
        raise RecipeError(
            f"student.keep.scores: found scores of {found['num_layers']} layers of {found['num_heads']} heads, expected"
            f" {layers} of {heads}"
        )
    return found


def table_of(found: Mapping[str, Any]) -> str:
    """The table of budgets in Markdown."""
    rows = [
        (f"{row['keep']} {row['choice']}".strip(), f"{row['heads']}", f"{row['kl']:.4f}", f"{row['cache_elements']:,}")
        for row in found["table"]
    ]
    headings = ("kept", "heads", "KL", f"numbers in the cache at {LONG:,} tokens")
    return f"# What attention is worth in {found['teacher']}\n\n{markdown_table(headings, rows)}\n"


def _calibration_only(recipe: Recipe) -> Recipe:
    """The recipe of a student without attention, whose last stage is the calibration."""
    blocks = recipe.stages.blocks()
    if not any(isinstance(block, CalibrateRecipe) for block in blocks.values()):
        raise RecipeError(f"student.init: found {recipe.student.start}, expected calibrated: scores need it")
    changes = {
        name: block.model_copy(update={"tokens": 0, "final_phase": None})
        for name, block in blocks.items()
        if not isinstance(block, CalibrateRecipe)
    }
    return recipe.model_copy(
        update={
            "student": recipe.student.model_copy(update={"keep": KeepRecipe()}),
            "stages": recipe.stages.model_copy(update=changes),
        }
    )


def _wanted(keep: KeepRecipe, layers: int, heads: int) -> tuple[int, int]:
    """How many layers and heads are to be chosen."""
    best_layers = (keep.number or share_of(keep.share or "", layers)) if keep.layers == "auto" else 0
    return best_layers, share_of(keep.heads, layers * heads) if isinstance(keep.heads, str) else 0


def _hybrids(conversion: Conversion, stop: Shutdown) -> Hybrids:
    """The calibrated student, with what its hybrids are made of."""
    recipe, models, world = conversion.recipe, conversion.models, conversion.world
    ((name, block),) = (
        (name, block) for name, block in recipe.stages.blocks().items() if isinstance(block, CalibrateRecipe)
    )
    source = calibration_text(conversion, block, stage_ranges(recipe, conversion.corpora)[name][0])
    fits = fits_of(models)
    total = sum(batches_of_passes(fits, source.num_batches).values()) * block.tokens_per_step
    with StageProgress("all heads", total, 0, is_shown=True) as progress:

        def on_batch(tokens: int) -> None:
            stop.check("while all heads are added up")
            progress.update(StepReport(0, tokens, 0.0, 0.0, 0.0, {}))

        calibrate(models, fits, source, world, on_batch)
    batches = evaluation_batches(conversion.held_out, recipe.evaluation.batch_sequences)
    return Hybrids(models, fits, list(batches))
