"""Which part of a rendered conversation the assistant wrote: what stage 3 learns where the loss is on completions."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from mohawkify.data.conversation import Message, Messages
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
    text = _Rendered(messages, rendered, render, marks, special_tokens)
    found = None
    if all(messages[index].keys() == {"role", "content"} for index in answers):
        found = _marked_spans(text)
    if found is None:
        spans = [_answer_span(text, index) for index in answers]
        found = [span for span in spans if span is not None]
    if len(found) < len(answers):
        raise DataError(
            f"{where}: the teacher's chat template does not write the assistant's words as they are, once and in order,"
            " so that they cannot be told from the rest",
            hint="count the predictions of all tokens: loss: all beside chat under data",
        )
    return tuple((start, end + _ending(rendered[end:], special_tokens, end_token)) for start, end in found)


class _Rendered(NamedTuple):
    """A conversation with its text, the template that wrote it, and marks that the text does not hold."""

    messages: Messages
    text: str
    render: Render
    marks: tuple[str, str]
    special_tokens: Collection[str]

    def pieces(self, others: Mapping[int, Message]) -> list[str]:
        """The text with other messages in some places, split at the marks in it: those are every second piece."""
        messages = [others.get(number, message) for number, message in enumerate(self.messages)]
        return re.split(f"([{''.join(self.marks)}])", self.render(messages, False))

    def in_front(self, index: int) -> Message:
        """A message with marks in front of its words."""
        content = self.messages[index]["content"]
        words = content.lstrip()
        return {**self.messages[index], "content": content.removesuffix(words) + "".join(self.marks) + words}

    def behind(self, index: int) -> Message:
        """A message with marks behind its words."""
        content = self.messages[index]["content"]
        words = content.rstrip()
        return {**self.messages[index], "content": words + "".join(self.marks) + content.removeprefix(words)}


def _marked_spans(text: _Rendered) -> list[Span] | None:
    """The spans of all answers, where the template writes them with marks as without."""
    marked = {
        index: {**message, "content": message["content"].join(text.marks)}
        for index, message in enumerate(text.messages)
        if message["role"] == "assistant"
    }
    pieces = text.pieces(marked)
    if pieces[1::2] != [*text.marks] * len(marked) or "".join(pieces[::2]) != text.text:
        return None
    ends = [sum(len(piece) for piece in pieces[:number:2]) for number in range(1, len(pieces), 2)]
    return list(zip(ends[::2], ends[1::2], strict=True))


def _answer_span(text: _Rendered, index: int) -> Span | None:
    """The span of one answer, found by what the template would write for one of marks alone.

    What the assistant said has to stand there; of an earlier answer a template may leave out the thoughts.
    """
    words = text.messages[index]["content"]
    if any(message["role"] == "assistant" for message in text.messages[index + 1 :]):
        words = words.split(_END_OF_THOUGHTS)[-1]
    others = {index: {"role": "assistant", "content": "".join(text.marks)}}
    # Some templates write results of functions as part of the answer that called them, and not without it.
    results = [place for place in range(index + 1, len(text.messages)) if text.messages[place]["role"] == "tool"]
    others |= {place: text.in_front(place) for place in results}
    try:
        pieces = text.pieces(others)
    except DataError:  # such as a template that wants calls of functions in front of their results
        pieces = []
    if pieces[1::2] == [*text.marks] * len(others) and not any(pieces[2::4]):
        span = _between(text, index, pieces[0], "".join(pieces[4::4]))
    elif len(pieces) in (0, 5):
        span = _from_beginnings(text, index)
    else:
        span = None
    if span is None or "".join(words.split()) not in "".join(text.text[span[0] : span[2]].split()):
        return None
    return span[1:]


def _between(text: _Rendered, index: int, before: str, behind: str) -> tuple[int, int, int] | None:
    """Where an answer's turn starts to differ from that of another, where it starts itself, and where it ends.

    What may differ is what a template writes for one answer and not for another: a block of thoughts in front, which
    then counts from the end of the prompt for an answer on, and the special token that ends it.

    Args:
        text: the conversation.
        index: of the answer.
        before: what stands in front of the other answer.
        behind: what stands behind it.
    """
    start = _num_same(text.text, before)
    same = _num_same(text.text[start:][::-1], behind[::-1])
    end = len(text.text) - same
    ending = behind[: len(behind) - same]
    if ending and not any(token.startswith(ending) for token in text.special_tokens):
        return None
    if not before[start:].strip():
        return start, start, end
    turn = 0
    if index > 0:
        pieces = text.pieces({index - 1: text.behind(index - 1)})
        turn = len(pieces[0])
        if pieces[1::2] != [*text.marks] or pieces[0] + pieces[-1] != text.text or turn > start:
            return None
    earlier = text.messages[:index]
    prompt = text.render(earlier, True).removeprefix(text.render(earlier, False))
    for opening in (prompt, prompt[: prompt.find("\n") + 1]):  # a prompt may go on with a block of no thoughts
        place = text.text.find(opening, turn, start + len(opening))
        if opening.strip() and place >= 0:
            return place, place + _num_same(text.text[place:], prompt), end
    return None


def _from_beginnings(text: _Rendered, index: int) -> tuple[int, int, int] | None:
    """The part that an answer adds to the conversation before it, where that is written as in the whole."""
    before, through = text.render(text.messages[:index], True), text.render(text.messages[: index + 1], False)
    if not (text.text.startswith(through) and through.startswith(before)):
        return None
    through = through.rstrip()
    ending = max((len(token) for token in text.special_tokens if through.endswith(token)), default=0)
    return len(before), len(before), max(len(before), len(through) - ending)


def _num_same(first: str, second: str) -> int:
    """How many characters two texts have in common at the beginning."""
    lengths = range(1, min(len(first), len(second)) + 1)
    return bisect_left(lengths, True, key=lambda length: first[:length] != second[:length])


def _ending(rest: str, special_tokens: Collection[str], end_token: str | None) -> int:
    """How many characters behind the words end the turn."""
    adjacent = max((len(token) for token in special_tokens if rest.startswith(token)), default=0)
    if adjacent or end_token is None:
        return adjacent
    blanks = len(rest) - len(rest.lstrip())
    return blanks + len(end_token) if rest.startswith(end_token, blanks) else 0
