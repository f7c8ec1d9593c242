"""Which layers and heads to keep: by the KL that their attention saves in a calibrated student."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mohawkify.files.atomic import read_json, write_json
from mohawkify.student.keep import evenly

FORMAT = "mohawkify-scores-1"
HEAD_ROUNDS = 8  # in which the best heads are taken, with a backward pass for each
CANDIDATES = 6  # after the first round, as many times the heads that are taken
LAYER_BUDGETS = (1, 2, 4, 8, 16, 32, 64)
LONG = 8192  # tokens of the context whose cache the table names
Heads = dict[int, tuple[int, ...]]  # kept heads by layer
Item = TypeVar("Item", bound=Hashable)


class Student(Protocol):
    """A calibrated student that can be given heads: `mohawkify.analysis.hybrid.Hybrids`."""

    def kl(self, kept: Heads) -> float:
        """KL(teacher || student) with these heads."""

    def savings(self, kept: Heads, wanted: Sequence[tuple[int, tuple[int, ...]]]) -> list[float]:
        """The KL that layers with all these heads would save, to first order."""


@dataclass(frozen=True)
class Sizes:
    """What there is to choose from, and how much of it.

    Args:
        layers: of the teacher.
        heads: of a layer.
        best_layers: how many layers are chosen, one after the other; 0 for none.
        best_heads: how many heads likewise.
    """

    layers: int
    heads: int
    best_layers: int
    best_heads: int

    def whole(self, layers: Iterable[int]) -> Heads:
        """All heads of some layers."""
        return {layer: tuple(range(self.heads)) for layer in sorted(layers)}


class Memo:
    """Measurements in a file, so that a score that was stopped goes on.

    Args:
        path: the file.
        facts: of the student; a file with others is refused by the caller, who put it beside the student.
        report: receives a line for every measurement.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], report: Callable[[str], None]) -> None:
        self._path, self._report = path, report
        found = read_json(path) if path.is_file() else {}
        same = {key: found.get(key) for key in facts} == dict(facts) and found.get("format") == FORMAT
        self.data: dict[str, Any] = found if same else {"format": FORMAT, **facts, "measured": {}, "estimated": {}}

    def measure(self, student: Student, kept: Heads) -> float:
        """`Student.kl`."""
        key = _key(kept)
        if key not in self.data["measured"]:
            self.data["measured"][key] = student.kl(kept)
            self._report(f"KL {self.data['measured'][key]:.4f} with {_words(kept)}")
            self.write()
        return float(self.data["measured"][key])

    def estimate(self, student: Student, kept: Heads, wanted: Sequence[tuple[int, tuple[int, ...]]]) -> list[float]:
        """`Student.savings`."""
        key = f"{_key(kept)} | {len(wanted)}"
        if key not in self.data["estimated"]:
            self._report(f"estimating what {len(wanted)} heads save beyond {_words(kept)}")
            self.data["estimated"][key] = student.savings(kept, wanted)
            self.write()
        found: list[float] = self.data["estimated"][key]
        return found

    def write(self) -> None:
        """Write everything."""
        write_json(self._path, self.data)


def rank(student: Student, sizes: Sizes, memo: Memo, cache_elements: Callable[[Heads], int]) -> dict[str, Any]:
    """Score all layers and heads, choose the best, and compare them with as many others.

    Args:
        student: the calibrated student.
        sizes: what is chosen from.
        memo: of its measurements.
        cache_elements: numbers in the caches of kept heads after `LONG` tokens.

    Returns:
        What the memo's file then holds.
    """
    pure = memo.measure(student, {})
    rows: list[dict[str, Any]] = [_row("none", "", {}, pure, cache_elements)]

    def add(name: str, choice: str, kept: Heads) -> None:
        rows.append(_row(name, choice, kept, memo.measure(student, kept), cache_elements))

    single = [pure - memo.measure(student, sizes.whole([layer])) for layer in range(sizes.layers)]

    def gain(chosen: Sequence[int], layer: int) -> float:
        return memo.measure(student, sizes.whole(chosen)) - memo.measure(student, sizes.whole([*chosen, layer]))

    layers = greedy(gain, dict(enumerate(single)), sizes.best_layers)
    for budget in sorted({*(each for each in LAYER_BUDGETS if each < len(layers)), len(layers)} - {0}):
        add(f"{budget} layers", "best", sizes.whole(layers[:budget]))
        if budget in (2, len(layers)):
            add(f"{budget} layers", "evenly spread", sizes.whole(evenly(budget, sizes.layers)))
            add(f"{budget} layers", "random", sizes.whole(random.Random(budget).sample(range(sizes.layers), budget)))
    grid, heads, steps = _best_heads(student, sizes, memo)
    for budget in steps:
        add(f"{budget} heads", "best", _by_layer(heads[:budget]))
    if heads:
        total = sizes.layers * sizes.heads
        for choice, numbers in (
            ("evenly spread", evenly(len(heads), total)),
            ("random", random.Random(0).sample(range(total), len(heads))),
        ):
            add(f"{len(heads)} heads", choice, _by_layer(divmod(number, sizes.heads) for number in numbers))
    memo.data |= {
        "sizes": asdict(sizes),
        "layers": {"saved": single, "best": layers},
        "heads": {"estimated": grid, "best": [list(head) for head in heads]},
        "table": rows,
    }
    memo.write()
    return memo.data


def greedy(gain: Callable[[Sequence[Item], Item], float], first: Mapping[Item, float], count: int) -> list[Item]:
    """Take the item with the largest gain, one after the other.

    A gain is measured anew only where it may be the largest: what others were taken before rarely makes one larger.

    Args:
        gain: of an item beyond those that were taken.
        first: the gains beyond nothing.
        count: how many are taken.
    """
    known, taken = dict(first), list[Item]()
    while known and len(taken) < count:
        fresh = set(known) if not taken else set()
        while (best := max(known, key=lambda item: known[item])) not in fresh:
            known[best] = gain(taken, best)
            fresh.add(best)
        taken.append(best)
        del known[best]
    return taken


def _best_heads(
    student: Student, sizes: Sizes, memo: Memo
) -> tuple[list[list[float]], list[tuple[int, int]], list[int]]:
    """What every head saves alone, the best ones in order, and how many there were after each round."""
    every = [(layer, head) for layer in range(sizes.layers) for head in range(sizes.heads)]
    taken: list[tuple[int, int]] = []
    grid: list[list[float]] = []
    steps: list[int] = []
    candidates = every
    per_round = max(1, -(-sizes.best_heads // HEAD_ROUNDS))
    while not grid or len(taken) < sizes.best_heads:
        kept = _by_layer(taken)
        wanted = [(layer, tuple(sorted((*kept.get(layer, ()), head)))) for layer, head in candidates]
        saved = dict(zip(candidates, memo.estimate(student, kept, wanted), strict=True))
        if not grid:
            grid = [[saved[layer, head] for head in range(sizes.heads)] for layer in range(sizes.layers)]
        best = sorted(candidates, key=lambda head: -saved[head])
        taken += best[: min(per_round, sizes.best_heads - len(taken))]
        candidates = [head for head in best[: CANDIDATES * sizes.best_heads] if head not in taken]
        steps.append(len(taken))
    return grid, taken, [step for step in steps if step]


def _by_layer(heads: Iterable[tuple[int, int]]) -> Heads:
    found: Heads = {}
    for layer, head in sorted(heads):
        found[layer] = (*found.get(layer, ()), head)
    return found


def _row(name: str, choice: str, kept: Heads, kl: float, cache_elements: Callable[[Heads], int]) -> dict[str, Any]:
    heads = sum(map(len, kept.values()))
    return {"keep": name, "choice": choice, "heads": heads, "kl": kl, "cache_elements": cache_elements(kept)}


def _key(kept: Heads) -> str:
    return " ".join(f"{layer}:{','.join(map(str, heads))}" for layer, heads in sorted(kept.items()))


def _words(kept: Heads) -> str:
    return f"{sum(map(len, kept.values()))} heads in layers {', '.join(map(str, sorted(kept)))}" if kept else "no head"
