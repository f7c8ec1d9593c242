"""Little stories in which names, things, colours and places must be remembered.

Every story tells a few facts about two or three characters, lets time pass, and ends with sentences that can only be
completed by whoever remembers which fact belonged to whom. Stories are a pure function of a seed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from mohawkify.demo import phrases
from mohawkify.errors import DataError

TRAIN_SEED = 1
VALIDATION_SEED = 2
TRAIN_STORIES = 14_000
VALIDATION_STORIES = 400

_RECALL = re.compile(r"\[(.*?)\]")


@dataclass(frozen=True)
class Character:
    """Everything a story may tell about one character; the slots of the templates in `phrases`."""

    name: str
    colour: str
    thing: str
    place: str
    animal: str
    pet: str
    food: str
    job: str
    gift: str
    giver: str


@dataclass(frozen=True)
class Story:
    """A story and the words in it that need memory.

    Args:
        recalls: character ranges (start, end) of the remembered words, in the order of the text.
    """

    text: str
    recalls: tuple[tuple[int, int], ...]


def stories(seed: int, count: int) -> list[str]:
    """Return `count` stories; the same seed always gives the same stories, and a larger count continues the list."""
    return [story.text for story in tell_stories(seed, count)]


def recall_questions(seed: int, count: int) -> list[tuple[str, str]]:
    """Return one memory question from each story of `stories(seed, count)`: its last one.

    Returns:
        Pairs (prompt, answer): the prompt is the story up to the remembered words and ends without a space, the answer
        starts with one, so that prompt + answer is the beginning of the story.
    """
    questions = []
    for story in tell_stories(seed, count):
        start, end = story.recalls[-1]
        questions.append((story.text[: start - 1], story.text[start - 1 : end]))
    return questions


def split_stories(name: str) -> list[str]:
    """Return the fixed `train` (about 2.3 million tokens) or `validation` stories; they share no story.

    Raises:
        DataError: there is no split of that name.
    """
    return [story.text for story in tell_split(name)]


def tell_split(name: str) -> list[Story]:
    """Return a split as `split_stories` does, with the places that need memory marked."""
    validation = tell_stories(VALIDATION_SEED, VALIDATION_STORIES)
    if name == "validation":
        return validation
    if name == "train":
        held_out = {story.text for story in validation}
        return [story for story in tell_stories(TRAIN_SEED, TRAIN_STORIES) if story.text not in held_out]
    raise DataError(f"the demo has no stories named {name!r}", hint='use "train" or "validation"')


def tell_stories(seed: int, count: int) -> list[Story]:
    """Return `count` stories as `stories` does, with the places that need memory marked."""
    random = Random(seed)
    return [_tell(random) for _ in range(count)]


def _tell(random: Random) -> Story:
    num_kinds = random.choice((1, 1, 2, 2, 3))
    cast = _draw_cast(random, size=random.choice((2, 3)) if num_kinds < 3 else 2)
    kinds = random.sample(phrases.FACT_KINDS, num_kinds)
    asides = random.sample(phrases.ASIDES, len(phrases.ASIDES))
    sentences = [_opening(random, cast)]
    for kind in kinds:
        for character in random.sample(cast, len(cast)):
            sentences.append(_fill(random.choice(kind.tell), character, _other(random, cast, character)))
        sentences += _pass_time(random, cast, asides, random.randint(0, 1))
        sentences.append(_remember(random, cast, kind, random.choice(cast)))
    sentences += _pass_time(random, cast, asides, random.randint(num_kinds - 1, 2 * num_kinds))
    pairs = [(kind, character) for kind in kinds for character in cast]
    sentences += [
        _remember(random, cast, kind, character) for kind, character in random.sample(pairs, min(5, len(pairs)))
    ]
    sentences.append(random.choice(phrases.ENDINGS))
    return _without_marks(" ".join(sentences))


def _draw_cast(random: Random, size: int) -> list[Character]:
    """Draw characters that share no slot value, so that every question has one answer."""
    names = random.sample(phrases.NAMES, size)
    colours = random.sample(phrases.COLOURS, size)
    things = random.sample(phrases.THINGS, 2 * size)
    spots = random.sample(phrases.SPOTS, size)
    animals = random.sample(phrases.ANIMALS, size)
    pets = random.sample(phrases.PETS, size)
    foods = random.sample(phrases.FOODS, size)
    jobs = random.sample(phrases.JOBS, size)
    givers = random.sample(phrases.GIVERS, size)
    return [
        Character(
            name=names[i],
            colour=colours[i],
            thing=things[i],
            place=f"{random.choice(phrases.SIDES)} {spots[i]}",
            animal=animals[i],
            pet=pets[i],
            food=foods[i],
            job=jobs[i],
            gift=things[size + i],
            giver=givers[i],
        )
        for i in range(size)
    ]


def _opening(random: Random, cast: list[Character]) -> str:
    *first, last = [character.name for character in cast]
    return f"{random.choice(phrases.TIMES)} {', '.join(first)} and {last} {random.choice(phrases.ERRANDS)}."


def _remember(random: Random, cast: list[Character], kind: phrases.FactKind, character: Character) -> str:
    return _fill(random.choice(kind.recall), character, _other(random, cast, character))


def _pass_time(random: Random, cast: list[Character], asides: list[str], count: int) -> list[str]:
    """Sentences without facts; the asides used are removed from the list."""
    sentences = []
    for _ in range(count):
        if random.random() < 0.25:
            scene = (phrases.WEATHER, phrases.MOVES, phrases.LANDS)
            sentences.append(" ".join(random.choice(words) for words in scene) + ".")
        else:
            character = random.choice(cast)
            sentences.append(_fill(asides.pop(), character, _other(random, cast, character)))
    return sentences


def _other(random: Random, cast: list[Character], character: Character) -> Character:
    return random.choice([candidate for candidate in cast if candidate != character])


def _fill(template: str, character: Character, other: Character) -> str:
    return template.format(**vars(character), other=other.name)


def _without_marks(marked: str) -> Story:
    """Take the square brackets out of a story and note where the words between them are."""
    recalls = []
    for index, match in enumerate(_RECALL.finditer(marked)):
        start = match.start() - 2 * index
        recalls.append((start, start + len(match.group(1))))
    return Story(_RECALL.sub(r"\1", marked), tuple(recalls))
