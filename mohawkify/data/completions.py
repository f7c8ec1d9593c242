"""Which part of a rendered conversation the assistant wrote: what stage 3 learns where the loss is on completions."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Collection

from mohawkify.data.conversation import Messages
from mohawkify.errors import DataError

Span = tuple[int, int]
Render = Callable[[Messages, bool], str]  # the template; whether the prompt for an answer ends the text

# Characters that mean nothing to anybody (Unicode's private use); the first pair that the text does not hold is taken.
_MARKS = [(chr(code), chr(code + 1)) for code in range(0xE000, 0xE100, 2)]
_END_OF_THOUGHTS = "</think>"


def completion_spans(
    messages: Messages,
    rendered: str,
    render: Render,
    *,
    special_tokens: Collection[str],
    end_token: str | None,
    where: str,
) -> tuple[Span, ...]:
    """Find what the assistant wrote in a rendered conversation.

    The conversation is rendered once more with marks around the assistant's words. Taken out, they must leave the text
    that was rendered without them: then they stand exactly where the template put the words, whatever it writes
    around them. Where they do not, or an answer is more than its words (calls of functions, thoughts), every answer is
    compared with what the template would write for an answer of marks alone. To a completion belongs the special token
    that ends it: one right behind the words, or the tokenizer's end token after blanks.

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
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return ()
    marks = next(pair for pair in _MARKS if not any(mark in rendered for mark in pair))
    found = None
    if all(messages[index].keys() == {"role", "content"} for index in answers):
        found = _marked_spans(messages, rendered, render, marks)
    if found is None:
        spans = [_answer_span(messages, index, rendered, render, marks, special_tokens) for index in answers]
        found = [span for span in spans if span is not None]
    if len(found) < len(answers):
        raise DataError(
            f"{where}: the teacher's chat template does not write the assistant's words as they are, once and in order,"
            " so that they cannot be told from the rest",
            hint="count the predictions of all tokens: loss: all beside chat under data",
        )
    return tuple((start, end + _ending(rendered[end:], special_tokens, end_token)) for start, end in found)


def _marked_spans(messages: Messages, rendered: str, render: Render, marks: tuple[str, str]) -> list[Span] | None:
    """The spans of all answers, where the template writes them with marks as without."""
    marked = [
        {**message, "content": message["content"].join(marks)} if message["role"] == "assistant" else message
        for message in messages
    ]
    num_answers = sum(message["role"] == "assistant" for message in messages)
    pieces = _pieces(render(marked, False), marks)
    if pieces[1::2] != [*marks] * num_answers or "".join(pieces[::2]) != rendered:
        return None
    ends = [sum(len(piece) for piece in pieces[:number:2]) for number in range(1, len(pieces), 2)]
    return list(zip(ends[::2], ends[1::2], strict=True))


def _pieces(text: str, marks: tuple[str, str]) -> list[str]:
    return re.split(f"([{''.join(marks)}])", text)


def _answer_span(
    messages: Messages,
    index: int,
    rendered: str,
    render: Render,
    marks: tuple[str, str],
    special_tokens: Collection[str],
) -> Span | None:
    """The span of one answer, which must hold its words; of an earlier one a template may leave out the thoughts."""
    words = messages[index]["content"]
    if any(message["role"] == "assistant" for message in messages[index + 1 :]):
        words = words.split(_END_OF_THOUGHTS)[-1]
    plain = {"role": "assistant", "content": "".join(marks)}
    try:
        pieces = _pieces(render([*messages[:index], plain, *messages[index + 1 :]], False), marks)
    except DataError:  # such as a template that wants calls of functions in front of their results
        span = _from_beginnings(messages, index, rendered, render, special_tokens)
    else:
        is_found = pieces[1::2] == [*marks] and not pieces[2]
        around = pieces[0], pieces[-1]
        span = _between(messages[:index], rendered, render, around, special_tokens) if is_found else None
    if span is None or "".join(words.split()) not in "".join(rendered[slice(*span)].split()):
        return None
    return span


def _num_same(first: str, second: str) -> int:
    """How many characters two texts have in common at the beginning."""
    lengths = range(1, min(len(first), len(second)) + 1)
    return bisect_left(lengths, True, key=lambda length: first[:length] != second[:length])


def _from_beginnings(
    messages: Messages, index: int, rendered: str, render: Render, special_tokens: Collection[str]
) -> Span | None:
    """The part that an answer adds to the conversation before it, where that is written as in the whole."""
    before, through = render(messages[:index], True), render(messages[: index + 1], False)
    if not (rendered.startswith(through) and through.startswith(before)):
        return None
    through = through.rstrip()
    ending = max((len(token) for token in special_tokens if through.endswith(token)), default=0)
    return len(before), max(len(before), len(through) - ending)


def _between(
    earlier: Messages, rendered: str, render: Render, around: tuple[str, str], special_tokens: Collection[str]
) -> Span | None:
    """The part of a text that differs from another, which has nothing between `around`.

    What may differ of `around` is what a template writes for one answer and not for another: a block of thoughts in
    front of it, which then counts from the end of the prompt for an answer on, and the special token that ends it.
    """
    before, behind = around
    start = _num_same(rendered, before)
    same = _num_same(rendered[start:][::-1], behind[::-1])
    ending = behind[: len(behind) - same]
    if ending and not any(token.startswith(ending) for token in special_tokens):
        return None
    if before[start:].strip():
        prompt = render(earlier, True).removeprefix(render(earlier, False))
        place = rendered.rfind(prompt, 0, start)
        if not prompt or place < 0 or before.rfind(prompt) != place:
            return None
        start = place + len(prompt)
    return start, len(rendered) - same


def _ending(rest: str, special_tokens: Collection[str], end_token: str | None) -> int:
    """How many characters behind the words end the turn."""
    adjacent = max((len(token) for token in special_tokens if rest.startswith(token)), default=0)
    if adjacent or end_token is None:
        return adjacent
    blanks = len(rest) - len(rest.lstrip())
    return blanks + len(end_token) if rest.startswith(end_token, blanks) else 0
