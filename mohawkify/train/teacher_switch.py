"""Which teacher teaches: the first, or in a final phase a second one, of which memory holds one at a time."""

from __future__ import annotations

from mohawkify.data.teacher_logits import TeacherLogits
from mohawkify.distributed.shutdown import Shutdown
from mohawkify.objectives.logits import LogitsObjective
from mohawkify.train.conversion import Conversion
from mohawkify.train.loop import Stage
from mohawkify.train.second_teacher import SecondTeacher
from mohawkify.train.watchdog import Watchdog


class TeacherSwitch:
    """Replaces the teacher of a conversion.

    Args:
        conversion: the run, with its first teacher in memory.
    """

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion
        named = conversion.recipe.stages.second_teacher()
        self._stage = None if named is None else named[0]
        self._has_second = False

    def must_load(self, stage: Stage, data: str) -> bool:
        """Whether the second teacher has to be loaded before a stage reads such text."""
        is_wanted = stage.name == self._stage and data == "final_phase"
        return is_wanted and isinstance(self._conversion.final_teacher, SecondTeacher) and not self._has_second

    def choose(self, stage: Stage, data: str, stop: Shutdown, hang: Watchdog) -> None:
        """Make the right teacher teach the text that a stage reads next; a signal while one is loaded ends at once."""
        conversion, final_teacher = self._conversion, self._conversion.final_teacher
        if isinstance(stage.objective, LogitsObjective) and isinstance(final_teacher, TeacherLogits):
            is_final = stage.name == self._stage and data == "final_phase"
            stage.objective.read_logits(final_teacher if is_final else None)
        if not self.must_load(stage, data):
            return
        assert isinstance(final_teacher, SecondTeacher)
        stop.end_at_once(f"before {final_teacher.teacher.name} was loaded; all steps are saved")
        conversion.options.report(f"{final_teacher.teacher.name} finishes the run: loading it")
        with hang.paused():
            conversion.models.replace_teacher(conversion.load_final, final_teacher.teacher.adapter)
            conversion.world.barrier()  # loading takes longer in some processes, and is no hang of theirs
        self._has_second = True

    @property
    def has_first(self) -> bool:
        """Whether the teacher in memory is the first one."""
        return not self._has_second

    def restore_first(self) -> None:
        """Load the first teacher again: every measurement of a run compares with it."""
        if self._has_second:
            models = self._conversion.models
            models.replace_teacher(self._conversion.load_first, models.adapter)
            self._has_second = False
