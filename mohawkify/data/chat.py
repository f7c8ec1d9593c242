"""Conversations as text: rendered with the teacher's own chat template."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohawkify.data.completions import Messages
from mohawkify.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {"human": "user", "gpt": "assistant"}  # the names used with {"from": ..., "value": ...}
_KNOWN_ROLES = ("system", "user", "assistant", "tool")

# The templates of the Llama 3 family write today's date unless one is given, and the same conversation would give
# other tokens tomorrow. This is the date they fall back to themselves where the clock is out of range
_TEMPLATE_DATE = "26 Jul 2024"

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


def read_conversation(value: Any, where: str) -> list[dict[str, str]]:
    """Read the messages of a conversation.

    Args:
        value: a list of messages, each ``{"role", "content"}`` or ``{"from", "value"}``.
        where: position of the conversation, for messages.

    Raises:
        DataError: if the value is no such list.
    """
    if not isinstance(value, list):
        raise DataError(f"{where} holds a {type(value).__name__}, expected a list of messages", hint=_FORMS)
    return [_message(message, where) for message in value]


def render_conversation(messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """Render one conversation as the teacher was trained to read it.

    Args:
        messages: ``{"role", "content"}`` each; none give no text.
        tokenizer: the teacher's tokenizer, with a chat template.
        where: position of the conversation, for messages.

    Raises:
        DataError: if the template refuses the conversation, or is not well meant.
    """
    from jinja2 import TemplateError

    if not messages:
        return ""
    try:
        with _bounded():
            rendered = tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, date_string=_TEMPLATE_DATE
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
    longest = _CHARACTERS + _REPEATS * sum(len(message["content"]) for message in messages)
    if len(rendered) > longest:
        raise _broken(where, f"makes {len(rendered):,} characters, expected at most {longest:,}")
    return rendered


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


_FORMS = 'write messages as {"role": ..., "content": ...} or {"from": ..., "value": ...}'


def _message(message: Any, where: str) -> dict[str, str]:
    if isinstance(message, dict) and {"role", "content"} <= message.keys():
        role, content = message["role"], message["content"]
    elif isinstance(message, dict) and {"from", "value"} <= message.keys():
        role, content = message["from"], message["value"]
    else:
        raise DataError(f"{where} holds a message of unknown form: {message!r:.80}", hint=_FORMS)
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _KNOWN_ROLES:
        raise DataError(f"{where} holds a message of unknown role {role!r}", hint=f"known: {', '.join(_KNOWN_ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where} holds a message whose content is a {type(content).__name__}, expected text")
    return {"role": role, "content": content}
