"""Scores: the choice on a student that is known, resumed without measuring again, drawn, and read by a recipe."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from mohawkify.analysis.heat_map import heat_map
from mohawkify.analysis.score import Memo, Sizes, greedy, rank
from mohawkify.errors import RecipeError
from mohawkify.recipe.schema import KeepRecipe
from mohawkify.student.keep import choose, evenly, share_of

SIZES = Sizes(layers=4, heads=3, best_layers=2, best_heads=3)


class Known:
    """Every head saves what is known of it; heads of layer 2 save nothing beside head 1 of layer 0."""

    worth = ((0.1, 0.5, 0.0), (0.2, 0.1, 0.0), (0.3, 0.25, 0.01), (0.0, 0.05, 0.02))

    def __init__(self, may_measure: bool = True) -> None:
        self.may_measure = may_measure

    def kl(self, kept):
        assert self.may_measure
        saved = sum(
            self.worth[layer][head]
            for layer, heads in kept.items()
            for head in heads
            if layer != 2 or 1 not in kept.get(0, ())
        )
        return 2.0 - saved

    def savings(self, kept, wanted):
        before = self.kl(kept)
        return [before - self.kl({**kept, layer: heads}) for layer, heads in wanted]


def scored(folder, student, lines):
    memo = Memo(folder / "scores.json", {"teacher": "known"}, lines.append)
    return rank(student, SIZES, memo, lambda kept: 10 * sum(map(len, kept.values())))


def test_the_best_are_found_one_after_the_other(tmp_path):
    lines: list[str] = []
    found = scored(tmp_path, Known(), lines)
    assert found["layers"]["saved"] == pytest.approx([0.6, 0.3, 0.56, 0.07])
    assert found["layers"]["best"] == [0, 1]  # layer 2 alone is worth more than 1, beside 0 nothing
    assert found["heads"]["best"] == [[0, 1], [1, 0], [0, 0]]
    assert found["heads"]["estimated"][2] == pytest.approx([0.3, 0.25, 0.01])
    best = {row["keep"]: row for row in found["table"] if row["choice"] in ("best", "")}
    assert best["none"]["kl"] == 2.0
    assert best["2 layers"]["kl"] == pytest.approx(1.1)
    assert best["3 heads"]["kl"] == pytest.approx(1.2)
    assert best["3 heads"]["cache_elements"] == 30
    for choice in ("evenly spread", "random"):
        rows = [row for row in found["table"] if row["choice"] == choice]
        assert [row["heads"] for row in rows] == [6, 3]
        assert all(row["kl"] >= best[row["keep"]]["kl"] for row in rows)
    assert lines[0] == "KL 2.0000 with no head"


def test_what_was_measured_is_not_measured_again(tmp_path):
    first = scored(tmp_path, Known(), [])
    assert scored(tmp_path, Known(may_measure=False), []) == first
    with pytest.raises(AssertionError):
        rank(Known(may_measure=False), SIZES, Memo(tmp_path / "scores.json", {"teacher": "x"}, print), lambda kept: 0)


def test_a_gain_is_measured_anew_only_where_it_may_be_the_largest():
    asked = []

    def gain(taken, item):
        asked.append(item)
        return {"a": 5.0, "b": 4.0, "c": 1.0}[item]

    assert greedy(gain, {"a": 5.0, "b": 4.0, "c": 1.0}, 2) == ["a", "b"]
    assert asked == ["b"]


def test_the_map_has_a_cell_for_every_head_and_layer():
    tree = ElementTree.fromstring(heat_map("<what> & why", [[0.1, 0.0], [-0.1, 0.4]], [0.2, 0.5]))
    titles = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert titles[:3] == ["layer 0, head 0: 0.1000", "layer 0, head 1: 0.0000", "layer 0: 0.2000"]
    assert len(titles) == 6


def test_a_recipe_takes_as_many_as_it_names():
    scores = {"layers": {"best": [3, 1]}, "heads": {"best": [[0, 2], [3, 1], [1, 0]]}}
    keep = KeepRecipe.model_validate({"layers": "auto", "number": 1, "heads": "25%"})
    assert choose(keep, 4, 3, scores) == ((3,), ((0, 2), (1, 0)))  # head 1 of layer 3 is in its layer
    assert choose(keep, 4, 3, None) == ((2,), ((0, 2), (3, 1)))  # as many, for a plan
    with pytest.raises(RecipeError, match="found scores that choose 2, expected 3"):
        choose(KeepRecipe.model_validate({"layers": "auto", "share": "75%"}), 4, 3, scores)
    with pytest.raises(RecipeError, match="found 4 of 4 layers, expected fewer"):
        choose(KeepRecipe.model_validate({"layers": "auto", "number": 4}), 4, 3, scores)
    assert (share_of("2%", 270), share_of("5%", 270), share_of("0.1%", 270)) == (5, 14, 1)
    assert evenly(7, 30) == [2, 6, 10, 15, 19, 23, 27]
