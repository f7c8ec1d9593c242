"""A conversion under way: the stages in turn, checkpoints on the way, a measurement after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mohawkify.data.corpus import Corpus
from mohawkify.data.loader import SampleRange
from mohawkify.data.stage_text import stage_ranges, stage_recipes
from mohawkify.data.teacher_logits import TeacherLogits
from mohawkify.data.validation import EvaluationBatch, evaluation_batches
from mohawkify.distributed.process_group import World
from mohawkify.distributed.shutdown import Shutdown
from mohawkify.errors import CheckpointError, DiskFullError
from mohawkify.evaluate.fidelity import measure_fidelity
from mohawkify.objectives.hidden_state import Align
from mohawkify.objectives.logits import Distill
from mohawkify.objectives.matrix import Orient
from mohawkify.objectives.objective import Pair, Stage
from mohawkify.plan.planner import STAGES
from mohawkify.recipe.schema import Recipe
from mohawkify.run import checkpoint
from mohawkify.run.folder import RunFolder
from mohawkify.run.metrics import MetricsLog
from mohawkify.teacher.second import FinalTeacher, SecondTeacher
from mohawkify.train.check_tensors import require_fitting
from mohawkify.train.engines.choice import build_engine
from mohawkify.train.engines.engine import Engine
from mohawkify.train.loop import StepReport, run_stage
from mohawkify.train.micro_batch import micro_batch_of, naming_what_to_try
from mohawkify.train.plateau import Phases, PlateauDetector
from mohawkify.train.progress import StageProgress
from mohawkify.train.rng_state import gather_random_state, restore_random_state
from mohawkify.train.tracking import Tracking
from mohawkify.train.training_state import Position, read_position
from mohawkify.train.watchdog import SpikeDetector, Watchdog

Report = Callable[[str], None]

SECONDS_BETWEEN_TRIES = 5.0  # of saving on a full disk


@dataclass
class Conversion:
    """A teacher, a student, text and a folder: all that training needs.

    Every process of a run has one and makes the same calls. Only the main one touches the folder, but for reading the
    tensors of a checkpoint.

    Args:
        run: the folder.
        recipe: what to do.
        identity: a hash of recipe and teacher, to know one's own checkpoints by.
        pair: teacher and student.
        corpora: the text of ``train`` and, where a stage ends on other text, of ``final_phase``.
        held_out: rows of text for measurements.
        device: where models and batches are.
        world: the processes of the run.
        report: receives a line for every step of the way.
        hang_timeout: seconds without progress after which the process ends; 0 for never.
        disk_wait: seconds to wait for space where the disk is full.
        final_teacher: what teaches the end of stage 3, if it is not the first teacher.
        load_first: loads the first teacher again, after another has taken its place.
        load_other: loads another one.
        start_tracking: begins what sends metrics to trackers, given the steps taken so far; None where nothing does.
    """

    run: RunFolder
    recipe: Recipe
    identity: str
    pair: Pair
    corpora: dict[str, Corpus]
    held_out: list[np.ndarray]
    device: torch.device
    world: World
    report: Report
    hang_timeout: float = 0.0
    disk_wait: float = 0.0
    final_teacher: FinalTeacher | None = None
    load_first: Callable[[], PreTrainedModel] | None = None
    load_other: Callable[[SecondTeacher], PreTrainedModel] | None = None
    start_tracking: Callable[[int], Tracking] | None = None
    _metrics: MetricsLog = field(init=False)
    _second_teaches: bool = field(default=False, init=False)
    _tracking: Tracking | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._metrics = MetricsLog(self.run.metrics_file, self.report)

    def train(self, stop: Shutdown) -> None:
        """Run all stages from wherever the folder's newest valid checkpoint is.

        A signal ends the process at once, but while a stage takes steps, which a checkpoint has to keep first.

        Raises:
            Interrupted: a stop was requested; a checkpoint was written first.
            CheckpointError: the checkpoint belongs to another recipe, teacher or text.
            NumericsError: a loss or gradient is not finite.
        """
        try:
            self._train(stop)
        finally:
            if self._tracking is not None:
                self._tracking.close()

    def _train(self, stop: Shutdown) -> None:
        saved = self._newest_checkpoint()
        if self.start_tracking is not None:
            self._tracking = self.start_tracking(0 if saved is None else saved.global_step)
        position = Position(stage="") if saved is None else self._restore(saved)
        self._forget_stages_ahead(position)
        if saved is None and "init" not in self._measured():
            self._measure("init", position, stop)
        stages, ranges = self._stages(), stage_ranges(self.recipe, self.corpora)
        names = list(stages)
        for name in names[names.index(position.stage) if position.stage else 0 :]:
            if not ranges[name]:
                continue
            if position.stage != name:
                position.stage, position.stage_step, position.losses, saved = name, 0, SpikeDetector(), None
                position.plateau, position.left_out = PlateauDetector(), {}
            engine, micro_batch = self._engine(stages[name], ranges[name])
            with naming_what_to_try(name, self.recipe, self.world, micro_batch):
                if saved is not None:
                    engine.load_parameters(checkpoint.load_tensors(saved, "model"))
                    engine.load_state(checkpoint.load_tensors(saved, "optimizer"))
                    restore_random_state(self.world, checkpoint.load_tensors(saved, "rng"))
                self._run_stage(stages[name], engine, micro_batch, ranges[name], position, stop)
            engine.close()
            if name not in self._measured():
                self._measure(name, position, stop)

    def _newest_checkpoint(self) -> checkpoint.Checkpoint | None:
        """The newest valid checkpoint; one process reads all its bytes to see that it is."""

        def look() -> dict[str, Any] | None:
            found = checkpoint.newest_valid(self.run.checkpoints, self.report)
            if found is None:
                number = len(checkpoint.list_checkpoints(self.run.checkpoints))
                if number:
                    self.report(f"none of {number} checkpoints is valid: beginning again")
                return None
            return {"path": str(found.path), "global_step": found.global_step, "state": found.state}

        facts = self.world.on_rank0(look)
        return checkpoint.Checkpoint(**{**facts, "path": Path(facts["path"])}) if facts else None

    def _forget_stages_ahead(self, position: Position) -> None:
        """Drop the metrics of stages that are not finished any more, their checkpoints being lost: others will come."""

        def forget() -> None:
            results = self.run.results()
            steps = {name: stage.num_steps for name, stage in stage_recipes(self.recipe).items()}
            kept = {"init"} | {name for name in STAGES if position.has_finished(name, steps[name])}
            ahead = [name for name in results["stages"] if name not in kept]
            for name in ahead:
                self.report(f"the checkpoints that {name} was measured at are lost: it will be measured again")
                del results["stages"][name]
            if ahead:
                self.run.write_results(results)

        self.world.on_rank0(forget)

    def _measured(self) -> list[str]:
        return self.world.on_rank0(lambda: list(self.run.results()["stages"]))

    def _engine(self, stage: Stage, ranges: list[SampleRange]) -> tuple[Engine, int]:
        """The student in its engine, and the sequences per forward pass."""

        def make(micro_batch: int) -> Engine:
            hang.beat()
            return build_engine(stage, self.recipe, micro_batch, self.device, self.world)

        # Where one process alone runs out of memory, the others wait for its part of a sharded layer.
        with Watchdog(
            self.hang_timeout, f"looking for a micro-batch of stage {stage.name} that fits", self.world
        ) as hang:
            micro_batch = micro_batch_of(stage, self.recipe, ranges, self.world, self.device, make)
        return make(micro_batch), micro_batch

    def _stages(self) -> dict[str, Stage]:
        recipes = self.recipe.stages
        return {
            "orient": Orient(self.pair),
            "align": Align(self.pair, recipes.align),
            "distill": Distill(self.pair, recipes.distill),
        }

    def _run_stage(
        self,
        stage: Stage,
        engine: Engine,
        micro_batch: int,
        ranges: list[SampleRange],
        position: Position,
        stop: Shutdown,
    ) -> None:
        stage_recipe = stage_recipes(self.recipe)[stage.name]
        phases = Phases(stage_recipe, self.recipe.schedule)
        num_steps = phases.num_steps
        num_tokens = sum(row["tokens"] for row in phases.outcome(position.left_out))
        left_out = phases.tokens_between(0, num_steps) - num_tokens
        done_tokens = phases.tokens_between(0, position.stage_step) - left_out
        trained = stage.parameters()
        frozen = [name for name, _ in self.pair.student.named_parameters() if name not in trained]
        saved_step = position.global_step
        with (
            StageProgress(stage.name, num_tokens, done_tokens, self.world.is_rank0) as progress,
            Watchdog(self.hang_timeout, f"training stage {stage.name}", self.world) as hang,
        ):

            def on_micro_batch() -> None:
                hang.beat()
                self._choose_teacher(stage, phases.segment_at(position.stage_step).data, stop, hang)
                stop.at_once = False  # training stops itself, with a checkpoint
                if stop.any_rank(self.world):
                    if position.global_step > saved_step:
                        self._save(engine, position, stop, hang)
                    stop.check(f"after step {position.stage_step:,} of stage {stage.name}, which is saved")

            def on_step(step: StepReport) -> bool:
                nonlocal saved_step
                hang.beat()
                position.stage_step = step.step
                position.global_step += 1
                position.tokens += step.tokens
                position.seconds[stage.name] = position.seconds.get(stage.name, 0.0) + step.seconds
                skip = phases.skip_to(step.step, step.metrics, position.plateau)
                self._log(step, position, skip)
                progress.update(step)
                if skip is not None:
                    progress.leave_out(phases.tokens_between(step.step, skip[0]))
                    self._leave_out(phases, position, *skip)
                is_stopping = stop.any_rank(self.world)
                is_over = position.stage_step == num_steps
                # Loading another teacher takes long: whatever ends it costs no step.
                is_last = is_over or self._awaits_teacher(stage, phases.segment_at(position.stage_step).data)
                if is_stopping or is_last or step.step % self.recipe.checkpoint.every_steps == 0:
                    self._save(engine, position, stop, hang)
                    saved_step = position.global_step
                    hang.beat()
                if is_stopping:
                    stop.check(f"after step {step.step:,} of stage {stage.name}, which is saved")
                return skip is not None

            def on_refused(step: int, metrics: dict[str, float], sequences: list[int]) -> None:
                if self.world.is_rank0:
                    place = {"stage": stage.name, "step": step, "global_step": position.global_step + 1}
                    text = {"text": phases.segment_at(step - 1).data, "sequences": sequences}
                    self._metrics.append({**place, **metrics, "refused": True, **text})

            while position.stage_step < num_steps:
                run_stage(
                    stage,
                    engine,
                    ranges,
                    stage_recipe,
                    self.recipe,
                    world=self.world,
                    device=self.device,
                    micro_batch=micro_batch,
                    first_step=position.stage_step,
                    frozen=frozen,
                    on_micro_batch=on_micro_batch,
                    on_step=on_step,
                    on_refused=on_refused,
                )
        stop.end_at_once(f"after stage {stage.name}, which is saved")

    def _awaits_teacher(self, stage: Stage, data: str) -> bool:
        """Whether another teacher has to be loaded before a stage reads such text."""
        is_there = self._second_teaches or not isinstance(self.final_teacher, SecondTeacher)
        return isinstance(stage, Distill) and data == "final_phase" and not is_there

    def _choose_teacher(self, stage: Stage, data: str, stop: Shutdown, hang: Watchdog) -> None:
        """Let the right one teach: the first, or at the end of stage 3 the one that finishes, loaded only then."""
        if isinstance(stage, Distill) and isinstance(self.final_teacher, TeacherLogits):
            stage.logits = self.final_teacher if data == "final_phase" else None
        if not self._awaits_teacher(stage, data):
            return
        assert isinstance(self.final_teacher, SecondTeacher)
        assert self.load_other is not None
        stop.end_at_once(f"before {self.final_teacher.name} was loaded; all steps are saved")
        self.report(f"{self.final_teacher.name} finishes the run: loading it")
        with hang.paused():
            self.pair.replace_teacher(partial(self.load_other, self.final_teacher), self.final_teacher.adapter)
            self.world.barrier()  # whoever has it first must not take the others' loading for a hang
        self._second_teaches = True

    def _bring_back_first(self) -> None:
        """Load the first teacher again: it is what every measurement of the run compares with."""
        if self._second_teaches:
            assert self.load_first is not None
            self.pair.replace_teacher(self.load_first, self.pair.adapter)
            self._second_teaches = False

    def _leave_out(self, phases: Phases, position: Position, border: int, improvement: float) -> None:
        """Go on where a saturated phase ends."""
        plateau, step = phases.plateau, position.stage_step
        assert plateau is not None
        data = phases.segment_at(step).data
        position.left_out[data] = position.left_out.get(data, 0) + border - step
        position.stage_step = border
        self.report(
            f"stage {position.stage} has saturated on {data} text at step {step:,}: within {plateau.window:,} tokens"
            f" the loss fell by {improvement:.2%}, expected {plateau.threshold:.2%}; going on after step {border:,}"
        )

    def _log(self, step: StepReport, position: Position, skip: tuple[int, float] | None) -> None:
        leap = position.losses.see(step.metrics["loss"])
        if not self.world.is_rank0:
            return
        if leap is not None:
            loss = step.metrics["loss"]
            self.report(
                f"step {step.step:,} of stage {position.stage}: the loss {loss:.4g} is {leap:.1f} standard deviations"
                " above the recent ones"
            )
        record = {
            "stage": position.stage,
            "step": step.step,
            "global_step": position.global_step,
            "tokens": position.tokens,
            **step.metrics,
            "learning_rate": step.learning_rate,
            "gradient_norm": step.gradient_norm,
            "seconds": step.seconds,
            **({} if leap is None else {"spike": leap}),
            **({} if skip is None else {"plateau": skip[1]}),
        }
        self._metrics.append(record)
        if self._tracking is not None:
            metrics = {f"{position.stage}/{name}": value for name, value in record.items() if name != "global_step"}
            self._tracking.log(metrics, position.global_step)

    def _save(self, engine: Engine, position: Position, stop: Shutdown, hang: Watchdog) -> None:
        model, optimizer, random = engine.parameters(), engine.state(), gather_random_state(self.world)
        self.world.on_rank0(lambda: self._write(model, optimizer, random, position, stop, hang), hang.beat)

    def _write(
        self,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        random: Mapping[str, Tensor],
        position: Position,
        stop: Shutdown,
        hang: Watchdog,
    ) -> None:
        deadline = time.monotonic() + self.disk_wait
        while True:
            try:
                self._metrics.flush()
                checkpoint.save_checkpoint(
                    self.run.checkpoints,
                    global_step=position.global_step,
                    model_tensors=model,
                    optimizer_tensors=optimizer,
                    random_tensors=random,
                    state={"identity": self.identity, "text": self._fingerprints(), "position": asdict(position)},
                    heartbeat=hang.beat,
                )
                break
            except DiskFullError as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                self.report(f"{error.message}; waiting {left:.0f} s more for space")
                next_try = time.monotonic() + min(SECONDS_BETWEEN_TRIES, left)
                while time.monotonic() < next_try:
                    stop.check(
                        f"at step {position.stage_step:,} of stage {position.stage}, which the disk has no room for"
                    )
                    hang.beat()
                    time.sleep(0.1)
        checkpoint.rotate(self.run.checkpoints, self.recipe.checkpoint.keep, hang.beat)

    def _restore(self, saved: checkpoint.Checkpoint) -> Position:
        if saved.state.get("identity") != self.identity:
            raise CheckpointError(f"{saved.path} belongs to another recipe or teacher")
        if saved.state.get("text") != self._fingerprints():
            raise CheckpointError(
                f"{saved.path} was trained on other text than is there now", hint="bring back the text, or start anew"
            )
        tensors, state = (checkpoint.load_tensors(saved, group) for group in ("model", "optimizer"))
        require_fitting(saved.path, self.pair.student, tensors, state)
        position = read_position(saved)
        self.report(f"continuing after step {position.stage_step:,} of stage {position.stage}")
        return position

    def _fingerprints(self) -> dict[str, str]:
        return {name: corpus.fingerprint for name, corpus in self.corpora.items()}

    def _measure(self, name: str, position: Position, stop: Shutdown) -> None:
        """Compare student and teacher on held-out text, of which each process reads a part, and record the metrics."""
        self._bring_back_first()
        batches = list(evaluation_batches(self.held_out, self.recipe.evaluation.batch_sequences))
        while len(batches) % self.world.size:  # a teacher that is spread over the processes is called by all of them
            batches.append(EvaluationBatch(batches[-1].input_ids, torch.zeros_like(batches[-1].valid)))
        with Watchdog(self.hang_timeout, f"measuring after {name}", self.world) as hang:

            def on_batch(num_tokens: int) -> None:
                hang.beat()
                stop.check(f"while measuring after {name}")

            found = measure_fidelity(
                self.pair.student,
                self.pair.teacher,
                batches[self.world.rank :: self.world.size],
                device=self.device,
                progress=on_batch,
                add_up=self.world.sum,
            )

        def record() -> None:
            results = self.run.results()
            results["teacher"]["perplexity"] = found.teacher_perplexity
            results["evaluation_tokens"] = found.tokens
            results["stages"][name] = {
                "tokens": position.tokens,
                "perplexity": found.perplexity,
                "kl": found.kl,
                "top1": found.top1,
                "seconds": position.seconds.get(name, 0.0),
                **({} if name == "init" else {"phases": self._phases(name, position)}),
            }
            self.run.write_results(results)

        self.world.on_rank0(record)
        if self._tracking is not None:
            metrics = {"perplexity": found.perplexity, "kl": found.kl, "top1": found.top1}
            self._tracking.log({f"held-out/{key}": value for key, value in metrics.items()}, position.global_step)
        self.report(
            f"after {name}: KL {found.kl:.4f} nats/token, top-1 {found.top1:.4f}, "
            f"perplexity {found.perplexity:.3f} (teacher {found.teacher_perplexity:.3f})"
        )
        stop.check(f"after measuring {name}")

    def _phases(self, name: str, position: Position) -> list[dict[str, Any]]:
        """What became of a stage's phases, told where there is more to tell than its budget."""
        stage = stage_recipes(self.recipe)[name]
        outcome = Phases(stage, self.recipe.schedule).outcome(position.left_out)
        if stage.plateau is not None or len(outcome) > 1:
            told = (f"{row['tokens']:,} tokens of {row['data']} text, ended by {row['ended_by']}" for row in outcome)
            self.report(f"{name}: {'; '.join(told)}")
        return outcome
