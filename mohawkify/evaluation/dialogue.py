"""A conversation with a student, whose state is kept from turn to turn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mohawkify.data.chat import render_conversation
from mohawkify.data.conversation import Conversation
from mohawkify.errors import DataError, UsageError
from mohawkify.evaluation.generation import GenerateOptions, read_on, remember, write_on
from mohawkify.student.saved_state import ReadText, load_state, save_state


class Dialogue:
    """A conversation with a student.

    A turn reads what is new since the last one, no more: the text of the conversation begins with what was read and
    written so far. Where a template writes earlier answers in another way, such as without their thoughts, the turn
    goes on from the state before the last answer, or reads everything again.

    Args:
        model: the student.
        tokenizer: with a chat template.
        model_hash: of the student, for saved states.
        options: of every answer; ``load_state`` is a conversation that goes on.
        system: the instructions in front; None for none.

    Raises:
        UsageError: there is no chat template, or instructions beside a conversation that has begun.
        CheckpointError: the saved state is none of this model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        model_hash: str,
        options: GenerateOptions,
        system: str | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise UsageError(
                "the student's tokenizer has no chat template, expected that of an instruction-tuned teacher",
                hint="`mohawkify generate` continues plain text",
            )
        self._model, self._tokenizer, self._hash, self._options = model, tokenizer, model_hash, options
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._ends = _ends(model, tokenizer)
        self.messages: list[dict[str, str]] = list(self._system)
        self._before: ReadText | None = None  # the last answer
        self._after: ReadText | None = None
        if options.load_state is not None:
            if system is not None:
                raise UsageError("found a saved state and a system prompt", hint="the state has its own: leave one out")
            self._after = load_state(options.load_state, model, model_hash)
            if not self._after.messages:
                raise UsageError(
                    f"{options.load_state} holds a text, expected a conversation",
                    hint="`/save FILE` in a chat saves one",
                )
            self.messages = self._after.messages

    def reset(self) -> None:
        """Forget all but the instructions in front."""
        self.messages, self._before, self._after = list(self._system), None, None

    def reply(
        self,
        text: str,
        on_text: Callable[[str], None] = lambda text: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> str:
        """Answer a message.

        Args:
            text: the message.
            on_text: receives each piece of the answer as it comes.
            is_stopped: asked after every token; True ends the answer there.

        Raises:
            DataError: the template refuses the conversation.
            UsageError: it is longer than the model's positions; the conversation stays as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = self._render(messages)
        known = [read for read in (self._after, self._before) if read and rendered.startswith(read.text)]
        read = known[0] if known else ReadText()
        read = read_on(self._model, self._tokenizer, read, rendered[len(read.text) :], special=False)
        remember(self._model, read)
        self._before = copy.deepcopy(read)
        answer = write_on(self._model, self._tokenizer, read, self._options, on_text, is_stopped)
        if read.ids[-1] in self._ends:  # not in the memory yet, and the template writes it
            read.ids.pop()
        self._after, self.messages = read, [*messages, {"role": "assistant", "content": answer}]
        return answer

    def save(self, path: Path) -> None:
        """Write the conversation and its state into a new file; raises UsageError where nothing was said yet."""
        if self._after is None:
            raise UsageError("the conversation is empty, expected a message before it is saved")
        save_state(path, ReadText(self._after.text, self._after.ids, self._after.cache, self.messages), self._hash)

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            return render_conversation(
                Conversation(messages), self._tokenizer, "the conversation", add_generation_prompt=True
            )
        except DataError as error:
            raise DataError(
                error.message, hint="leave out the system prompt, which not every template knows"
            ) from error


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: of the model's settings and of the tokenizer, whose template writes its own."""
    settings = model.generation_config.eos_token_id
    ends = {*(settings if isinstance(settings, list) else [settings]), tokenizer.eos_token_id} - {None}
    model.generation_config.eos_token_id = sorted(ends)
    return ends
