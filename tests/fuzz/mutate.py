"""Mutations that the targets share: of bytes, of texts with lines, and of JSON values."""

from __future__ import annotations

import copy
import json
import re
from random import Random
from typing import Any

# JSON texts that Python's own writer does not give; they travel as strings between these marks until `render`.
_MARK = "@@"
RAW = tuple(f"{_MARK}{text}{_MARK}" for text in ("NaN", "Infinity", "-Infinity", "1e999", "-0", "1E5", "0.1e-400"))
PATHS = (
    *("../outside", "../../../../etc/passwd", "/etc/passwd", "a/../../b", "..", ".", "", "~", "~root/x", "C:\\x"),
    *("\\\\host\\share", "file:///etc/passwd", "a\0b", "x" * 300, "model.safetensors/", "./model.safetensors"),
    *("%2e%2e/x", "．．/x", "a\nb", "\u202etxt.exe", "/dev/zero", "/proc/self/mem", "https://example.org/x"),
)
NUMBERS = (0, -1, 1, 2, 3, 16, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30)
PLAIN = (None, True, False, 0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, "", "16", "-1", "nan", "x", "\ud800", "é", "a" * 5000)
NESTED = ([], {}, [[]], [0], [None], {"": {}}, [1, 2, 3], ["full_attention"], {"type": "linear"}, {"__class__": "x"})
WORDS = (
    *(
        "&a *a",
        "!!python/object:os.system",
        "<<: {}",
        "? [a]",
        "---",
        "...",
        "%YAML 9.9",
        "%TAG ! x",
        "|",
        ">-",
        "- - -",
    ),
    *(
        "{",
        "}",
        "[",
        "]",
        ": ",
        "#",
        "'",
        '"',
        '"\\UFFFFFFFF"',
        '"\\ud800"',
        '"\\0"',
        "\t",
        "\r",
        "\x85",
        "\u2028",
        "\ufeff",
    ),
    *(
        ".inf",
        ".nan",
        "1e-4",
        "0x10",
        "1_000",
        "12:30",
        "yes",
        "~",
        "null",
        "true",
        "9" * 70,
        "1e999",
        "-0",
        "80M",
        "2.7B",
    ),
)


def odd_value(rng: Random) -> Any:
    """A JSON value at some boundary."""
    pool: Any = rng.choice((NUMBERS, NUMBERS, PLAIN, PLAIN, NESTED, RAW, PATHS))
    if rng.random() < 0.02:
        depth = rng.choice((20, 200, rng.randint(850, 1000), rng.randint(850, 1000), 10_000))
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        return f"{_MARK}{opening * depth}0{closing * depth}{_MARK}"
    return copy.deepcopy(rng.choice(pool))


def mutate_bytes(rng: Random, data: bytes, times: int | None = None) -> bytes:
    """Change bytes blindly: flips, cuts, repetitions, zero pages, insertions."""
    result = bytearray(data)
    for _ in range(times or rng.randint(1, 4)):
        at = rng.randrange(len(result) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64, 512))
        kind = rng.randrange(7)
        if kind == 0 and at < len(result):
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del result[at : at + length]
        elif kind == 2:
            result[at:at] = result[max(0, at - length) : at]
        elif kind == 3:
            result[at : at + length] = bytes(len(result[at : at + length]))
        elif kind == 4:
            result[at:at] = rng.randbytes(length)
        elif kind == 5:
            result[at : at + 1] = bytes([rng.choice((0, 9, 10, 13, 0x22, 0x80, 0xC0, 0xED, 0xFF))])
        elif rng.random() < 0.3:
            del result[at:]
    return bytes(result)


def mutate_lines(rng: Random, text: str) -> str:
    """Change a text by its lines: drop, repeat, swap, indent, another value, an odd word somewhere."""
    lines = text.split("\n")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        other = rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind == 0 and len(lines) > 1:
            del lines[at]
        elif kind == 1:
            lines.insert(other, lines[at])
        elif kind == 2:
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3:
            lines[at] = rng.choice(("  ", " ", "\t", "- ")) + lines[at]
        elif kind == 4:
            lines[at] = lines[at].removeprefix("  ")
        elif kind == 5:
            key, colon, _ = lines[at].partition(":")
            lines[at] = f"{key}{colon} {_word(rng)}"
        elif kind == 6:
            place = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + _word(rng) + lines[at][place:]
        else:
            place = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + lines[at][place + 1 :]
    return "\n".join(lines)


def _word(rng: Random) -> str:
    return rng.choice(WORDS) if rng.random() < 0.7 else render(odd_value(rng))


def mutate_json(rng: Random, value: Any, times: int | None = None) -> Any:
    """Change a JSON value in one to four places: another value, a key lost, renamed or added, an item repeated."""
    result = copy.deepcopy(value)
    for _ in range(times or rng.choice((1, 1, 1, 2, 3, 4))):
        place = result
        while True:
            keys = (
                list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
            )
            if not keys:
                result = odd_value(rng) if place is result else result
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
                place = place[key]
                continue
            _change_item(rng, place, key)
            break
    return result


def _change_item(rng: Random, place: Any, key: Any) -> None:
    kind = rng.random()
    if kind < 0.6:
        place[key] = odd_value(rng)
    elif kind < 0.75:
        del place[key]
    elif isinstance(place, list):
        place.insert(key, copy.deepcopy(place[key]))
    elif kind < 0.85:
        place[rng.choice((f"{key} ", str(key).upper(), "", *PATHS))] = place.pop(key)
    else:
        place[f"{key}{rng.choice(('', '_', '2'))}"] = odd_value(rng)


def render(value: Any) -> str:
    """Write a JSON value, with the texts between marks as they are."""
    text = json.dumps(value)
    return re.sub(f'"{_MARK}(.*?){_MARK}"', lambda match: match[1].replace('\\"', '"'), text)


def render_twice(rng: Random, value: Any) -> str:
    """Write a JSON object with one of its keys written twice."""
    text = render(value)
    if not isinstance(value, dict) or not value:
        return text
    return f"{text[:-1]}, {json.dumps(rng.choice(list(value)))}: {render(odd_value(rng))}}}"
