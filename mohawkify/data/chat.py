"""Conversations as text: rendered with the teacher's own chat template."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from mohawkify.data.conversation import THOUGHTS, Conversation, Message, Messages
from mohawkify.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A template that writes today's date would give the same conversation other tokens tomorrow. All get this one, which
# those of the Llama 3 family fall back to themselves where the clock is out of range.
_DATE = date(2024, 7, 26)
_TEMPLATE_DATE = f"{_DATE:%d %b %Y}"
_DATE_CODES = (*"aAbBcdeDFGHIjmMpRSTuUVwWxXyYzZ", "-d", "-m", "-H", "-I", "-j", "-M", "-S", "-y", "%")
# A macro in front hides the function that transformers gives to templates under this name.
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{code}', '{_DATE.strftime(f'%{code}')}')" for code in _DATE_CODES)
    + " }}{% endmacro %}\n"
)

# A template is a program of a stranger in transformers' sandbox, which keeps it from files but not from endless loops.
_SECONDS = 1.0  # of computing, not of waiting: a busy machine does not count
_MEMORY_BYTES = 256 << 20
_CHARACTERS = 1_000_000  # beyond what the conversation itself brings
_REPEATS = 2  # of the conversation; some templates quote it


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot render conversations.

    Raises:
        DataError: if it has no chat template.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the data holds conversations, but the teacher's tokenizer has no chat template",
            hint="use an instruction-tuned teacher, or plain text (`text` instead of `chat` under data)",
        )


def render_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, where: str, *, add_generation_prompt: bool = False
) -> str:
    """Render one conversation as the teacher was trained to read it.

    Args:
        conversation: what is rendered; no messages give no text.
        tokenizer: the teacher's tokenizer, with a chat template.
        where: position of the conversation, for messages.
        add_generation_prompt: end with what stands in front of an answer.

    Raises:
        DataError: if the template refuses the conversation, or is not well meant.
    """
    from jinja2 import TemplateError

    messages, tools, documents = conversation
    if not messages:
        return ""
    try:
        with _bounded():
            template = tokenizer.get_chat_template(tools=tools)
            rendered = tokenizer.apply_chat_template(
                [_known(message, template) for message in messages],
                tools=tools,
                documents=documents,
                chat_template=_FIXED_CLOCK + template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                date_string=_TEMPLATE_DATE,
            )
    except TemplateError as error:
        raise DataError(
            f"{where}: the teacher's chat template refuses the conversation: {str(error)[:300]}",
            hint="remove the row, or bring its roles into the order that the template wants",
        ) from error
    except _Timeout as error:
        raise _broken(where, f"takes longer than {_SECONDS:g} s") from error
    except MemoryError as error:
        raise _broken(where, f"needs more than {_MEMORY_BYTES >> 20} MB of memory") from error
    except Exception as error:  # a template may do to the values in it whatever Python lets it
        raise _broken(where, f"fails: {type(error).__name__}: {str(error)[:300]}") from error
    if not isinstance(rendered, str):
        raise _broken(where, f"makes a {type(rendered).__name__}, expected text")
    if len(rendered) > _CHARACTERS and len(rendered) > (longest := _CHARACTERS + _REPEATS * len(repr(conversation))):
        raise _broken(where, f"makes {len(rendered):,} characters, expected at most {longest:,}")
    return rendered


def require_written(conversation: Conversation, rendered: str, render: Callable[[Messages], str], where: str) -> None:
    """Refuse a conversation in which a turn would be empty, or end too early, because the template leaves out a part.

    Args:
        conversation: what was rendered.
        rendered: its text.
        render: the template.
        where: position of the conversation, for messages.

    Raises:
        DataError: calls of functions, or the thoughts of an answer without words, make no difference to the text.
    """
    messages = conversation.messages
    wordless = {key for key in THOUGHTS for message in messages if message.get(key) and not message["content"]}
    for key in ("tool_calls", *wordless):
        if not any(key in message for message in messages):
            continue
        try:
            without = render([{name: value for name, value in each.items() if name != key} for each in messages])
        except DataError:
            continue  # the template wants it
        if without == rendered:
            raise DataError(
                f"{where} holds {key}, which the teacher's chat template does not write: the turn would end without",
                hint="use a teacher whose template writes it, or leave such rows out",
            )


def _known(message: Message, template: str) -> Message:
    """A message as a template knows it: to those without developers these are what gives the system's instructions."""
    return {**message, "role": "system"} if message["role"] == "developer" and "developer" not in template else message


def _broken(where: str, what: str) -> DataError:
    return DataError(
        f"{where}: the teacher's chat template {what}",
        hint="read the template (chat_template.jinja or tokenizer_config.json): it is damaged, or not well meant",
    )


@contextmanager
def _bounded() -> Iterator[None]:
    """Bound computing time and memory inside.

    Time is bounded in the main thread only, where signals arrive; memory only where the system reports its use.

    Raises:
        _Timeout: the time is over.
        MemoryError: the template needs more than the bound.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, _raise_timeout) if is_main_thread else None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + _MEMORY_BYTES
    is_lower = limit > _MEMORY_BYTES and (soft == resource.RLIM_INFINITY or limit < soft)
    try:
        if is_lower:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        if is_main_thread:
            signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
        yield
    finally:
        if is_main_thread:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        if is_lower:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _Timeout(BaseException):
    """No Exception: Jinja tries constant expressions while it compiles and goes on after any Exception in them."""


def _raise_timeout(number: int, frame: object) -> None:
    raise _Timeout


def _address_space() -> int:
    """Bytes of address space in use, or 0 if the system does not report them."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
