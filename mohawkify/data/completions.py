"""Which part of a rendered conversation the assistant wrote: what stage 3 learns where the loss is on completions."""

from __future__ import annotations

import re
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
    where: str,
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
        where: position of the conversation, for messages.

    Returns:
        (first character, character behind the last) of each completion, in order.

    Raises:
        DataError: the template changes, leaves out or repeats what the assistant wrote.
    """
    num_wanted = sum(message["role"] == "assistant" for message in messages)
    if num_wanted == 0:
        return ()
    marks = next(pair for pair in _MARKS if not any(mark in rendered for mark in pair))
    for mark in (_mark_all, _mark_from_first_word, _mark_words):
        pieces = re.split(f"([{''.join(marks)}])", render(_marked(messages, mark, marks)))
        if pieces[1::2] == [*marks] * num_wanted and "".join(pieces[::2]) == rendered:
            break
    else:
        raise DataError(
            f"{where}: the teacher's chat template does not write the assistant's words as they are, once and in order,"
            " so that they cannot be told from the rest",
            hint="count the predictions of all tokens: loss: all beside chat under data",
        )
    spans = []
    end = 0
    for outside, inside in zip(pieces[:-1:4], pieces[2::4], strict=True):
        start = end + len(outside)
        end = start + len(inside)
        spans.append((start, end + _ending(rendered[end:], special_tokens, end_token)))
    return tuple(spans)


def _marked(messages: Messages, mark: Callable[[str, str, str], str], marks: tuple[str, str]) -> Messages:
    return [
        {**message, "content": mark(message["content"], *marks)} if message["role"] == "assistant" else message
        for message in messages
    ]


def _mark_all(content: str, before: str, behind: str) -> str:
    return f"{before}{content}{behind}"


# Many templates cut blanks off the ends, and a mark in their place would keep them from it.
def _mark_from_first_word(content: str, before: str, behind: str) -> str:
    words = content.lstrip()
    return f"{content[: len(content) - len(words)]}{before}{words}{behind}"


def _mark_words(content: str, before: str, behind: str) -> str:
    words = content.rstrip()
    return f"{_mark_from_first_word(words, before, behind)}{content[len(words) :]}"


def _ending(rest: str, special_tokens: Collection[str], end_token: str | None) -> int:
    """How many characters behind the words end the turn."""
    adjacent = max((len(token) for token in special_tokens if rest.startswith(token)), default=0)
    if adjacent or end_token is None:
        return adjacent
    blanks = len(rest) - len(rest.lstrip())
    return blanks + len(end_token) if rest.startswith(end_token, blanks) else 0
