"""Conversations as rows hold them: the forms that are about, brought into the one that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mohawkify.errors import DataError

Message = dict[str, Any]  # "role" and "content", both text, and whatever else the row has
Messages = Sequence[Message]
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names under which messages have them

# The names used with {"from": ..., "value": ...}, and an older one of OpenAI's.
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
_CALL_ROLE = "function_call"  # of a message whose value is a call, as JSON
_TEXT_PARTS = ("text", "input_text", "output_text")
_FORMS = 'write messages as {"role": ..., "content": ...} or {"from": ..., "value": ...}'


class Conversation(NamedTuple):
    """A conversation and what belongs to it, as chat templates read them.

    Args:
        messages: ``role`` and ``content``, which is text, and the row's other keys, none of which is null.
        tools: descriptions of functions, or None.
        documents: texts that an answer may use, or None.
    """

    messages: Messages
    tools: list[Any] | None = None
    documents: list[Any] | None = None


def read_conversation(value: Any, beside: Mapping[str, Any], where: str) -> Conversation:
    """Read the messages of a conversation.

    Args:
        value: a list of messages, each ``{"role", "content"}`` or ``{"from", "value"}``, or that as JSON text.
        beside: the row's ``tools`` and ``documents``, each a list of objects, some of it or all as JSON text.
        where: position of the conversation, for messages.

    Raises:
        DataError: a value is something else.
    """
    messages = _from_json(value)
    if not isinstance(messages, list):
        raise DataError(f"{where} holds a {type(value).__name__}, expected a list of messages", hint=_FORMS)
    return Conversation(
        [_message(message, where) for message in messages],
        _objects(beside.get("tools"), "tools", where, _as_function),
        _objects(beside.get("documents"), "documents", where, lambda document: document),
    )


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not ("role" in message or {"from", "value"} <= message.keys()):
        raise DataError(f"{where} holds a message of unknown form: {message!r:.80}", hint=_FORMS)
    found = {key: value for key, value in message.items() if value is not None}
    if "role" not in message:
        found = {"role": found.pop("from", None), "content": found.pop("value", None), **found}
    call = found.pop("function_call", None)
    role = found.get("role")
    if role == _CALL_ROLE:
        role, call = "assistant", found.pop("content", None)
    if call is not None:
        found["tool_calls"] = call
    calls = _objects(found.pop("tool_calls", None), "tool_calls", where, _as_call)
    if calls is not None:
        found["tool_calls"] = calls
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _KNOWN_ROLES:
        raise DataError(f"{where} holds a message of unknown role {role!r}", hint=f"known: {', '.join(_KNOWN_ROLES)}")
    return {**found, "role": role, "content": _content(found, where)}


def _content(message: Message, where: str) -> str:
    """The words of a message as one text; none where it says something in another way."""
    content = message.get("content")
    if content is None and any(message.get(key) for key in ("tool_calls", *THOUGHTS)):
        return ""
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") or "text" if isinstance(part, dict) else type(part).__name__
            if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
                raise DataError(f"{where} holds a message with a part of type {kind!r:.40}, expected parts of text")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where} holds a message whose content is a {type(content).__name__}, expected text")
    return content


def _objects(
    value: Any, name: str, where: str, form: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]] | None:
    """A list of objects, some of it or all as JSON text, which tables use where rows have different keys."""
    value = _from_json(value)
    items = [_from_json(item) for item in (value if isinstance(value, list) else [value]) if item not in (None, "")]
    if not items:
        return None
    for item in items:
        if not isinstance(item, dict):
            raise DataError(
                f"{where}: {name} holds {str(item)!r:.60}, expected a list of objects",
                hint=f"write a list of objects, or leave a column out with {name}: null beside chat under data",
            )
    return [form(item) for item in items]


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _as_function(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": item} if "name" in item and "function" not in item else item


def _as_call(item: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments are an object, as templates write them; OpenAI's form has them as JSON text."""
    call = _as_function(item)
    function = call.get("function")
    if isinstance(function, dict) and isinstance(_from_json(function.get("arguments")), dict):
        function = {**function, "arguments": _from_json(function["arguments"])}
    return {**call, "function": function}
