"""The method from top to bottom: prepare, resume, measure, train and measure every stage, write the student."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from typing import Any

from mohawkify.data.loader import SampleRange
from mohawkify.data.stage_text import stage_ranges
from mohawkify.distributed.process_group import World
from mohawkify.distributed.shutdown import Shutdown
from mohawkify.errors import UsageError
from mohawkify.evaluation.report import markdown_report
from mohawkify.files import atomic
from mohawkify.objectives.catalogue import make_objective
from mohawkify.recipe.schema import CalibrateRecipe, Recipe
from mohawkify.run.checkpoint import Checkpoint
from mohawkify.run.folder import RunFolder
from mohawkify.student.save import save_student, weight_bytes
from mohawkify.train.calibrate import batches_of_passes, calibrate, calibration_text
from mohawkify.train.checks import RefusedStepError
from mohawkify.train.conversion import Conversion, ConvertOptions
from mohawkify.train.engines.choice import build_engine
from mohawkify.train.engines.engine import Engine
from mohawkify.train.loop import Stage, StepReport, steps
from mohawkify.train.measuring import START, drop_lost_measurements, measure, measure_within, measured
from mohawkify.train.micro_batch import micro_batch_of, naming_what_to_try
from mohawkify.train.plateau import Phases
from mohawkify.train.preparation import prepare, read_request
from mohawkify.train.progress import StageProgress
from mohawkify.train.saving import (
    CheckpointWriter,
    load_best_student,
    newest_checkpoint,
    resume_engine,
    resume_state,
    resume_student,
)
from mohawkify.train.step_log import StepLog
from mohawkify.train.teacher_switch import TeacherSwitch
from mohawkify.train.tracking import require_trackers
from mohawkify.train.training_state import TrainingState
from mohawkify.train.tuning import find_rate, recorded_rates
from mohawkify.train.watchdog import RiseCheck, Watchdog


def convert(teacher_source: str, recipe: Recipe, options: ConvertOptions, world: World | None = None) -> RunFolder:
    """Convert a teacher; where several processes work on it, each makes the same call.

    Args:
        teacher_source: the teacher: a Hub id or a folder.
        recipe: the resolved recipe.
        options: how the conversion runs.
        world: the processes, which share a file system; None for this one alone.

    Returns:
        The finished run.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the same call continues.
        MohawkifyError: anything foreseeable; nothing is left half-written.
    """
    require_trackers(options.track)
    world = world or World()
    with Shutdown() as stop:
        try:
            request = read_request(teacher_source, recipe, options, world)
            with request.locked():  # before what takes minutes, such as hashing the teacher
                conversion = prepare(request)
                if conversion is None:
                    request.options.report(f"{request.run.path} is already finished")
                    return request.run
                stop.check("before training")
                train(conversion, stop)
                stop.check("before the student was written")
                world.on_rank0(lambda: write_student(conversion))
                stop.check("after the student was written: the run is finished")
            return request.run
        except KeyboardInterrupt:
            stop.check("outside of training; nothing is half-written")
            raise


def tune(
    teacher_source: str, recipe: Recipe, options: ConvertOptions, world: World | None = None
) -> dict[str, dict[str, Any]]:
    """Take the first steps of a conversion, and find the learning rates of its stages; the conversion may follow.

    Args:
        teacher_source: as in `convert`.
        recipe: likewise; what it has for learning rates does not count.
        options: likewise.
        world: likewise.

    Returns:
        What was found, by stage; see `RangeTest.run`.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the same call continues.
        UsageError: the folder holds a run that trains, or has.
    """
    world = world or World()
    with Shutdown() as stop:
        request = read_request(teacher_source, recipe, options, world)
        with request.locked():
            conversion = prepare(request)
            if conversion is None:
                raise UsageError(f"{request.run.path} is already finished", hint="choose another --output")
            train(conversion, stop, finds_rates_alone=True)
        return world.on_rank0(lambda: recorded_rates(request.run))


def train(conversion: Conversion, stop: Shutdown, finds_rates_alone: bool = False) -> None:
    """Run all stages of the recipe from wherever the folder's newest valid checkpoint is.

    With ``finds_rates_alone`` only a calibration runs, and for the other stages a range test.

    A signal ends the process at once, except while a stage takes steps, which a checkpoint keeps first.

    Raises:
        Interrupted: a stop was requested; a checkpoint was written first.
        CheckpointError: the checkpoint belongs to another recipe, teacher or text.
        NumericsError: a loss or gradient is not finite, or weights do not learn.
    """
    saved = newest_checkpoint(conversion)
    with StepLog(conversion, 0 if saved is None else saved.global_step) as log:
        Trainer(conversion, stop, log, saved, finds_rates_alone).train()


def write_student(conversion: Conversion) -> None:
    """Write the report and the student; only then is the run finished."""
    run, student = conversion.run, conversion.models.student
    name = load_best_student(conversion)
    results = run.results()
    results["student"] = {key: results["stages"][name][key] for key in ("perplexity", "kl", "top1")}
    results["name"] = conversion.models.spec.name
    results["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    run.write_results(results)
    atomic.write_text(run.path / "report.md", markdown_report(results))
    with atomic.atomic_directory(run.final, needed=weight_bytes(student)) as folder:
        save_student(student, conversion.tokenizer, folder)
    conversion.options.report(f"the student is in {run.final}")


class Trainer:
    """Trains and measures the stages of a conversion.

    Args:
        conversion: the run.
        stop: a request to stop.
        log: receives every step.
        saved: the checkpoint to continue from; None to begin.
        finds_rates_alone: whether learning rates are found, and nothing is trained.
    """

    def __init__(
        self,
        conversion: Conversion,
        stop: Shutdown,
        log: StepLog,
        saved: Checkpoint | None,
        finds_rates_alone: bool = False,
    ) -> None:
        self._conversion, self._stop, self._log, self._saved = conversion, stop, log, saved
        self._finds_rates_alone = finds_rates_alone
        self._state = TrainingState() if saved is None else resume_state(conversion, saved)
        self._checkpoints = CheckpointWriter(conversion, log, stop, self._state.global_step)
        self._teachers = TeacherSwitch(conversion)
        self._rise: RiseCheck | None = None

    def train(self) -> None:
        """Measure the start, then train and measure one stage after the other."""
        conversion, state = self._conversion, self._state
        drop_lost_measurements(conversion, state)
        if self._saved is None:
            self._measure(START)
        else:
            conversion.calibrations.clear()  # the first checkpoint comes after them; they hold copies of weights
        blocks = conversion.recipe.stages.blocks()
        ranges = stage_ranges(conversion.recipe, conversion.corpora)
        names = list(blocks)
        for name in names[names.index(state.stage) if state.stage else 0 :]:
            if not ranges[name]:
                continue
            saved = self._saved if state.stage == name else None
            if state.stage != name:
                state.begin(name)
            if isinstance(block := blocks[name], CalibrateRecipe):
                self._calibrate(block, ranges[name][0], saved)
                self._measure(name)
                continue
            stage = Stage(name, make_objective(conversion.models, block), ranges[name])
            if self._finds_rates_alone:
                if saved is not None:
                    raise UsageError(f"{conversion.run.path} trains already", hint="choose another --output")
                self._micro_batch_and_rate(stage)
                continue
            self._train_stage(stage, saved)
            self._measure(name)

    def _measure(self, name: str) -> None:
        """Compare with the first teacher, unless results.json has it."""
        if name not in measured(self._conversion):
            self._teachers.restore_first()
            metrics = measure(self._conversion, name, self._state, self._stop)
            self._log.add_measurement(metrics, self._state)
            self._stop.check(f"after measuring {name}")

    def _calibrate(self, block: CalibrateRecipe, text: SampleRange, saved: Checkpoint | None) -> None:
        """Fit the mixers to the teacher's attention, all at once, or load what a checkpoint holds."""
        conversion, state = self._conversion, self._state
        if saved is not None:
            resume_student(conversion, saved)
            return
        batches = sum(batches_of_passes(conversion.calibrations, block.num_steps).values())
        begin = time.perf_counter()
        with (
            StageProgress(
                state.stage, batches * block.tokens_per_step, 0, is_shown=conversion.world.is_rank0
            ) as progress,
            Watchdog(conversion.options.hang_timeout, f"training stage {state.stage}", conversion.world) as hang,
        ):

            def on_batch(tokens: int) -> None:
                hang.heartbeat()
                self._stop.check(f"in stage {state.stage}, of which nothing is saved before its end")
                progress.update(StepReport(0, tokens, 0.0, 0.0, 0.0, {}))

            source = calibration_text(conversion, block, text)
            relative = calibrate(conversion.models, conversion.calibrations, source, conversion.world, on_batch)
            conversion.calibrations.clear()
            tokens, seconds = block.num_steps * block.tokens_per_step, time.perf_counter() - begin
            step = StepReport(block.num_steps, tokens, 0.0, 0.0, seconds, {"loss": relative, "relative": relative})
            state.add_step(step.step, step.tokens, step.seconds)
            self._log.add_step(step, state, None)
            self._checkpoints.save_student(state, hang)

    def _train_stage(self, stage: Stage, saved: Checkpoint | None) -> None:
        """Build the engine, load what a checkpoint holds of the stage, take the steps, gather the student again."""
        conversion = self._conversion
        micro_batch, rate = self._micro_batch_and_rate(stage)
        stage = replace(stage, learning_rate=rate)
        engine = build_engine(stage.objective, conversion.recipe, micro_batch, conversion.device, conversion.world)
        with naming_what_to_try(conversion, stage, micro_batch):
            if saved is not None:
                resume_engine(conversion, saved, engine)
            self._take_steps(stage, engine, micro_batch)
        engine.close()

    def _micro_batch_and_rate(self, stage: Stage) -> tuple[int, float]:
        """What the recipe leaves to be found before a stage, from the student as it is."""
        conversion, block = self._conversion, stage.objective.block
        with Watchdog(  # where one process runs out of memory, the others hang in a collective call
            conversion.options.hang_timeout,
            f"looking for micro-batch and learning rate of stage {stage.name}",
            conversion.world,
        ) as hang:

            def make_engine(micro_batch: int) -> Engine:
                hang.heartbeat()
                return build_engine(
                    stage.objective, conversion.recipe, micro_batch, conversion.device, conversion.world
                )

            def check() -> None:
                hang.heartbeat()
                self._stop.check(f"while the learning rate of stage {stage.name} was looked for")

            micro_batch = micro_batch_of(conversion, stage, make_engine)
            if block.learning_rate != "auto" and not self._finds_rates_alone:
                return micro_batch, block.learning_rate
            self._teachers.choose(stage, block.segments()[0].data, self._stop, hang)
            with naming_what_to_try(conversion, stage, micro_batch):
                return micro_batch, find_rate(conversion, stage, self._state, micro_batch, check)

    def _take_steps(self, stage: Stage, engine: Engine, micro_batch: int) -> None:
        conversion, state = self._conversion, self._state
        phases = Phases(stage.objective.block, conversion.recipe.schedule)
        self._rise = RiseCheck(phases.num_steps) if state.stage_step == 0 else None
        total, done = phases.tokens_to_read(state.skipped), phases.tokens_read(state.stage_step, state.skipped)
        with (
            StageProgress(stage.name, total, done, conversion.world.is_rank0) as progress,
            Watchdog(conversion.options.hang_timeout, f"training stage {stage.name}", conversion.world) as hang,
        ):

            def check() -> None:
                """Between micro-batches: stop if any process has received a signal; the step under way is lost."""
                hang.heartbeat()
                self._stop.defer()
                if self._stop.any_rank(conversion.world):
                    if not self._checkpoints.has_saved(state):
                        self._checkpoints.save(engine, state, hang)
                    saved = f"after step {state.stage_step:,} of stage {stage.name}, which is saved"
                    self._stop.check(saved if state.global_step else "before the first step")

            if state.stage_step == 0:
                self._measure_within(engine, hang)
            while state.stage_step < phases.num_steps:  # a phase on a plateau ends early: then from a later step
                self._teachers.choose(stage, phases.segment_at(state.stage_step).data, self._stop, hang)
                try:
                    with closing(steps(conversion, stage, engine, micro_batch, state.stage_step, check)) as taken:
                        for step in taken:
                            hang.heartbeat()
                            skipped_to = self._add_step(stage, phases, step, progress)
                            if state.stage_step < phases.num_steps:
                                self._measure_within(engine, hang, step.tokens)
                            self._save_and_stop(stage, phases, step.step, engine, hang)
                            if skipped_to is not None or state.stage_step == phases.num_steps:
                                break
                            self._teachers.choose(stage, phases.segment_at(state.stage_step).data, self._stop, hang)
                except RefusedStepError as error:
                    self._log.add_refused(error, state, phases.segment_at(state.stage_step).data)
                    raise
        self._stop.end_at_once(f"after stage {stage.name}, which is saved")

    def _add_step(self, stage: Stage, phases: Phases, step: StepReport, progress: StageProgress) -> int | None:
        """Count, log and show a step; returns the step to go on with where the phase is on a plateau."""
        state = self._state
        state.add_step(step.step, step.tokens, step.seconds)
        state.num_idle += not step.metrics
        skip = phases.skip_to(step.step, step.metrics, state.plateau)
        self._log.add_step(step, state, None if skip is None else skip.improvement)
        progress.update(step)
        self._report_rise(stage, step)
        if skip is None:
            return None
        data = phases.segment_at(step.step).data
        progress.skip(phases.tokens_between(step.step, skip.step))
        state.skip_to(skip.step, data)
        self._conversion.options.report(
            f"stage {stage.name} is on a plateau on {data} text at step {step.step:,}: within {skip.window:,} tokens"
            f" the loss fell by {skip.improvement:.2%}, expected {skip.threshold:.2%}; going on after step"
            f" {skip.step:,}"
        )
        return skip.step

    def _measure_within(self, engine: Engine, hang: Watchdog, tokens: int = 0) -> None:
        """Measure at a stage's beginning, and where a step of so many tokens has crossed the recipe's interval."""
        conversion, state = self._conversion, self._state
        every = conversion.recipe.evaluation.every_tokens
        if every is None or not self._teachers.has_first:  # all measurements of a run compare with the first one
            return
        if tokens == 0 or state.tokens // every > (state.tokens - tokens) // every:
            metrics = measure_within(conversion, state, engine, lambda _: hang.heartbeat())
            self._log.add_measurement_within(metrics, state)

    def _report_rise(self, stage: Stage, step: StepReport) -> None:
        """Say so where the loss rises from the stage's beginning; not after a resume, which did not see it."""
        rise = self._rise.add(step.metrics["loss"]) if self._rise is not None and step.metrics else None
        if rise is not None:
            self._conversion.options.report(
                f"in the first tenth of stage {stage.name} the loss rose to {rise:.2f} times its start:"
                f" stages.{stage.name}.learning_rate is probably too high"
            )

    def _save_and_stop(self, stage: Stage, phases: Phases, step: int, engine: Engine, hang: Watchdog) -> None:
        """Save at the interval, at the end, before a long load and where a stop was requested, which ends the run."""
        state, conversion = self._state, self._conversion
        is_stopping = self._stop.any_rank(conversion.world)
        is_last = state.stage_step == phases.num_steps or self._teachers.must_load(
            stage, phases.segment_at(state.stage_step).data
        )
        if is_stopping or is_last or step % conversion.recipe.checkpoint.every_steps == 0:
            self._checkpoints.save(engine, state, hang)
        if is_stopping:
            self._stop.check(f"after step {step:,} of stage {stage.name}, which is saved")
