"""Conversations as text: rendered with the teacher's own chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mohawkify.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {"human": "user", "gpt": "assistant"}  # the names used with {"from": ..., "value": ...}
_KNOWN_ROLES = ("system", "user", "assistant", "tool")

# The templates of the Llama 3 family write today's date unless they are told one, and the same conversation would give
# other tokens tomorrow. This is the date they fall back to themselves where the clock is out of reach.
_TEMPLATE_DATE = "26 Jul 2024"


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


def render_conversation(value: Any, tokenizer: PreTrainedTokenizerBase, place: str) -> str:
    """Render one conversation as the teacher was trained to read it.

    Args:
        value: a list of messages, each ``{"role", "content"}`` or ``{"from", "value"}``.
        tokenizer: the teacher's tokenizer, with a chat template.
        place: where the conversation stands, for messages.

    Raises:
        DataError: if the value is no such list, or the template refuses it.
    """
    from jinja2 import TemplateError

    if not isinstance(value, list):
        raise DataError(f"{place} holds a {type(value).__name__}, expected a list of messages", hint=_FORMS)
    if not value:
        return ""
    messages = [_message(message, place) for message in value]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, date_string=_TEMPLATE_DATE)
    except TemplateError as error:
        raise DataError(
            f"{place}: the teacher's chat template refuses the conversation: {error}",
            hint="remove the row, or bring its roles into the order that the template wants",
        ) from error
    assert isinstance(rendered, str)  # the return type depends on tokenize
    return rendered


_FORMS = 'write messages as {"role": ..., "content": ...} or {"from": ..., "value": ...}'


def _message(message: Any, place: str) -> dict[str, str]:
    if isinstance(message, dict) and {"role", "content"} <= message.keys():
        role, content = message["role"], message["content"]
    elif isinstance(message, dict) and {"from", "value"} <= message.keys():
        role, content = message["from"], message["value"]
    else:
        raise DataError(f"{place} holds a message of unknown form: {message!r:.80}", hint=_FORMS)
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _KNOWN_ROLES:
        raise DataError(f"{place} holds a message of unknown role {role!r}", hint=f"known: {', '.join(_KNOWN_ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{place} holds a message whose content is a {type(content).__name__}, expected text")
    return {"role": role, "content": content}
