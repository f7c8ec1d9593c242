"""The words and sentences that the little stories are made of, all written for this project.

A sentence is a `str.format` template over the slots of one character (see `stories.Character`), `{other}` being
somebody else in the story. Square brackets mark words that can be known only by remembering an earlier sentence.
"""

from __future__ import annotations

from dataclasses import dataclass

NAMES = ("Mia", "Tom", "Anna", "Ben", "Clara", "Leo", "Nora", "Max", "Ivy", "Jack")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "silver", "brown")
THINGS = ("kite", "ball", "drum", "lamp", "book", "boat", "hat", "box", "bell", "key", "ring", "clock")
SIDES = ("behind", "under", "beside")
SPOTS = ("the mill", "the bridge", "the barn", "the oak", "the well", "the tower", "the gate", "the wall")
ANIMALS = ("dog", "cat", "pony", "goat", "rabbit", "duck", "mouse", "lamb")
PETS = ("Biscuit", "Pepper", "Button", "Shadow", "Daisy", "Lucky", "Ginger", "Comet")
FOODS = ("soup", "bread", "honey", "cheese", "rice", "plums", "beans", "cake")
JOBS = ("sailor", "baker", "painter", "doctor", "farmer", "singer", "pilot", "teacher")
GIVERS = ("Rose", "Finn", "June", "Otto", "Hazel", "Peter", "Ralph", "Lily")


@dataclass(frozen=True)
class FactKind:
    """One sort of thing to remember about a character.

    Args:
        tell: sentences that tell the fact.
        recall: sentences, later in the story, that need it.
    """

    name: str
    tell: tuple[str, ...]
    recall: tuple[str, ...]


FACT_KINDS = (
    FactKind(
        "hidden",
        tell=(
            "{name} hid a {colour} {thing} {place}.",
            "{name} carried a {colour} {thing} and put it {place}.",
            "{name} left a {colour} {thing} {place}, where nobody would look.",
            "The {colour} {thing} belonged to {name}, who kept it {place}.",
            "Nobody saw how {name} pushed a {colour} {thing} into the shadow {place}.",
        ),
        recall=(
            '"Where is the {thing}?" asked {other}. "The {thing} is [{place}]," said {name}.',
            "{other} wanted to see the {thing} again. They looked [{place}], and there it was.",
            "At last they went back, and the {thing} was still [{place}].",
            '"I saw your {thing} [{place}]," said {other} to {name}.',
            "They found the {thing} [{place}].",
            '"I have lost it," cried {name}. "No," said {other}, "you left the {thing} [{place}]."',
            '"Which {thing} is yours?" asked {other}. "The [{colour}] one," said {name}.',
            "{other} drew a picture of the {thing} and painted it [{colour}].",
            "{other} searched {place} and found the [{colour} {thing}].",
            '"Who owns the {thing}?" asked the old woman. "It belongs to [{name}]," they said.',
        ),
    ),
    FactKind(
        "pet",
        tell=(
            "{name} had a {animal} called {pet}.",
            "{name} came with a small {animal}, and its name was {pet}.",
            "The {animal} that followed {name} was called {pet}.",
            "{name} loved a {animal} that everybody called {pet}.",
            "Everybody in the street knew the {animal} {pet}, and {name} fed it.",
            "With {name} came a {animal}, {pet}.",
        ),
        recall=(
            '"What is the name of your {animal}?" asked {other}. "My {animal} is called [{pet}]," said {name}.',
            '{name} could not see the {animal} and shouted, "Come back, [{pet}]!"',
            '{name} put the {animal} to bed. "Sleep well, [{pet}]!"',
            '"Good morning, {animal} [{pet}]," said {other}.',
            "The {animal} called [{pet}] was the first to wake up.",
            '"Whose {animal} is this?" asked the old man. "It belongs to [{name}]," they said.',
            "{pet} jumped up and ran to [{name}].",
            '"{pet} is a fine [{animal}]," said {other}.',
        ),
    ),
    FactKind(
        "food",
        tell=(
            "{name} was hungry and wanted {food}.",
            "{name} liked {food} more than anything else.",
            "{name} ate {food}.",
            "In the morning {name} asked for {food}.",
            '"I could eat {food} every day," said {name}.',
        ),
        recall=(
            "When supper came, {name} ate [{food}] and smiled.",
            "For {name} there was [{food}].",
            '"What would you like to eat?" asked {other}, and {name} said, "Some [{food}], please."',
            "The cook had not forgotten {name} and brought a plate of [{food}].",
            "A plate of {food} stood on the table, and it was for [{name}].",
        ),
    ),
    FactKind(
        "wish",
        tell=(
            "{name} wanted to become a {job}.",
            "One day {name} would be a {job}.",
            '"When I am big, I will be a {job}," said {name}.',
            "{name} dreamed of the life of a {job}.",
        ),
        recall=(
            '"I have not forgotten," said {other}. "{name} will be a [{job}]."',
            "Many years later {name} really was a [{job}].",
            "They played a game, and of course {name} was the [{job}].",
            'Then they needed a {job}. "That is work for [{name}]," they said.',
        ),
    ),
    FactKind(
        "gift",
        tell=(
            "{name} had got a {gift} from {giver}.",
            "{giver} had given {name} a {gift}.",
            "{name} was proud of a {gift}, a present from {giver}.",
            "With a letter {giver} had sent {name} a {gift}.",
        ),
        recall=(
            '"Who gave you that?" asked {other}. "The {gift} is from [{giver}]," said {name}.',
            "That evening {name} wrote a letter to thank [{giver}] for the {gift}.",
            "Everybody liked the {gift} from [{giver}].",
            '{other} saw the {gift} and said, "You must thank [{giver}]."',
            '"{giver} was kind," said {name} and looked at the [{gift}].',
        ),
    ),
)

TIMES = (
    "One morning",
    "One day",
    "Long ago",
    "On a cold evening",
    "Early in spring",
    "In the last week of summer",
    "On a rainy day",
    "After school",
    "Before the holidays",
    "On the first day of autumn",
)
ERRANDS = (
    "walked to the market",
    "met in the village",
    "went down to the river",
    "climbed the hill",
    "played in the garden",
    "waited for the train",
    "sat in the kitchen",
    "came to the harbour",
    "crossed the wide field",
    "visited the island",
    "slept in a tent",
    "helped in the orchard",
)
ASIDES = (
    "{name} kicked a stone along the path.",
    "{name} counted the clouds and laughed.",
    "{name} told a long joke about a king.",
    "{name} sang a song without words.",
    "{name} stopped to tie a shoe.",
    "{name} was quiet and only listened.",
    "{name} ran ahead and came back again.",
    "{name} asked {other} for a story.",
    "{name} and {other} raced to the corner.",
    "{name} gave {other} half of an apple.",
    "{name} waved, and {other} waved back.",
    "{name} shared a secret with {other}.",
    "{other} helped {name} over the fence.",
    '"Wait for me!" called {name}.',
    '"Look at the sky," said {name} to {other}.',
    '"Are you cold?" asked {other}, but {name} was not.',
    '"We have time," said {name}.',
    "They rested for a while and talked about the sea.",
    "They lost their way twice, but nobody was afraid.",
    "They shared some water and went on.",
    "Nobody said much for a long time.",
    "Far away a dark horse stood still and watched.",
    "A cart with two wheels rolled slowly by.",
    "Three children with wet feet came past.",
    "Then the hours went by, one after another.",
)
WEATHER = ("The wind", "The rain", "The sun", "A thin fog", "A small cloud", "The cold air", "The evening light")
MOVES = ("came over", "moved across", "covered", "passed over", "crept over", "hung above")
LANDS = ("the fields", "the roofs", "the hills", "the street", "the water", "the trees", "the valley", "the houses")
ENDINGS = (
    "Then everybody went home.",
    "It had been a good day.",
    "Soon the stars came out, and they said good night.",
    "They promised to meet again.",
    "And that was the end of it.",
    "They laughed all the way home.",
    "After that the village was quiet.",
    "The next day they did it all again.",
)
