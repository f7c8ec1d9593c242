"""Which part of a rendered conversation the assistant wrote: what stage 3 learns where the loss is on completions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from mohawkify.errors import DataError

Messages = Sequence[Mapping[str, str]]
Span = tuple[int, int]

# Characters that mean nothing to anybody (Unicode's private use); the first pair that the text does not hold is taken.
_MARKS = [(chr(code), chr(code + 1)) for code in range(0xE000, 0xE100, 2)]


def completion_spans(
    messages: Messages,
    rendered: str,
    render: Callable[[Messages], str],
    *,
    special_tokens: Collection[str],
    end_token: str | None,
    place: str,
) -> tuple[Span, ...]:
    """Find what the assistant wrote in a rendered conversation.

    The conversation is rendered once more with marks around the assistant's words. Taken out, they must leave the text
    that was rendered without them: then they stand exactly where the template put the words, whatever it writes
    around them. To a completion belongs the special token that ends it: one right behind the words, or the tokenizer's
    end token after blanks.

    Args:
        messages: ``{"role", "content"}`` each.
        rendered: the conversation as the template writes it.
        render: the template.
        special_tokens: the tokenizer's, as text.
        end_token: its end token, if it has one.
        place: where the conversation stands, for messages.

    Returns:
        (first character, character behind the last) of each completion, in order.

    Raises:
        DataError: the template changes, leaves out or repeats what the assistant wrote.
    """
    wanted = [message["content"] for message in messages if message["role"] == "assistant"]
    if not wanted:
        return ()
    before, behind = next(pair for pair in _MARKS if not any(mark in rendered for mark in pair))
    marked = render(
        [
            {**message, "content": _mark(message["content"], before, behind)}
            if message["role"] == "assistant"
            else message
            for message in messages
        ]
    )
    parts = marked.replace(behind, before).split(before)
    if "".join(parts) != rendered or len(parts) != 2 * len(wanted) + 1:
        raise DataError(
            f"{place}: the teacher's chat template does not write the assistant's words as they are, once and in order,"
            " so that they cannot be told from the rest",
            hint="count the predictions of all tokens: loss: all beside chat under data",
        )
    spans = []
    end = 0
    for number in range(len(wanted)):
        start = end + len(parts[2 * number])
        end = start + len(parts[2 * number + 1])
        spans.append((start, end + _ending(rendered[end:], special_tokens, end_token)))
    return tuple(spans)


def _mark(content: str, before: str, behind: str) -> str:
    """Mark the words; blanks around them stay outside, since many templates cut them off."""
    words = content.strip()
    lead, trail = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
    return f"{lead}{before}{words}{behind}{trail}" if words else f"{content}{before}{behind}"


def _ending(rest: str, special_tokens: Collection[str], end_token: str | None) -> int:
    """How many characters behind the words end the turn."""
    adjacent = max((len(token) for token in special_tokens if rest.startswith(token)), default=0)
    if adjacent or end_token is None:
        return adjacent
    blanks = len(rest) - len(rest.lstrip())
    return blanks + len(end_token) if rest.startswith(end_token, blanks) else 0
