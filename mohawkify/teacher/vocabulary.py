"""Checks that two teachers have the same token for every id: the tokens are compared, not names or sizes."""

from __future__ import annotations

from collections.abc import Mapping

from mohawkify.errors import TeacherError


def require_same_vocabulary(first: Mapping[str, int], second: Mapping[str, int], names: tuple[str, str]) -> None:
    """Refuse two vocabularies that differ in any token; rows of an embedding that have no token do not matter.

    Args:
        first: the id of every token of the teacher that is converted.
        second: that of the other teacher.
        names: of both, for the message.

    Raises:
        TeacherError: names the differing token with the smallest id.
    """
    if dict(first) == dict(second):
        return
    tokens = [{index: token for token, index in vocabulary.items()} for vocabulary in (first, second)]
    index = min(i for i in tokens[0].keys() | tokens[1].keys() if tokens[0].get(i) != tokens[1].get(i))
    found = [f"is {each[index]!r}" if index in each else "has no token" for each in tokens]
    raise TeacherError(
        f"the vocabularies differ: id {index} {found[0]} in {names[0]} and {found[1]} in {names[1]}",
        hint="a student can be finished only by a teacher with the very same vocabulary",
    )
