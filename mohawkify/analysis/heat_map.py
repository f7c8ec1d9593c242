"""A heat map as SVG: one cell for every head of every layer, and one for the whole layer."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CELL, LEFT, TOP, RIGHT = 18, 60, 46, 20


def heat_map(title: str, heads: Sequence[Sequence[float]], layers: Sequence[float]) -> str:
    """Draw what heads and layers are worth, the darker the more; what is worth nothing is white.

    Args:
        title: stands above.
        heads: by layer and head.
        layers: of whole layers.

    Returns:
        The SVG text.
    """
    columns = max(map(len, heads), default=0)
    width, height = LEFT + (columns + 2) * CELL + RIGHT, TOP + len(layers) * CELL + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(width, 340)} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="16">{escape(title)}</text>',
        f'<text x="{LEFT}" y="{TOP - 8}">heads from 0</text>',
        f'<text x="{LEFT + (columns + 1) * CELL}" y="{TOP - 8}">all</text>',
    ]
    most_head, most_layer = _most(value for row in heads for value in row), _most(layers)
    for index, whole in enumerate(layers):
        down = TOP + index * CELL
        lines.append(f'<text x="8" y="{down + 13}">layer {index}</text>')
        for head, value in enumerate(heads[index] if index < len(heads) else ()):
            lines.append(_cell(LEFT + head * CELL, down, value, most_head, f"layer {index}, head {head}"))
        lines.append(_cell(LEFT + (columns + 1) * CELL, down, whole, most_layer, f"layer {index}"))
    return "\n".join([*lines, "</svg>", ""])


def _most(values: object) -> float:
    return max([1e-12, *values])  # type: ignore[misc]


def _cell(x: int, y: int, value: float, most: float, name: str) -> str:
    light = round(255 * (1 - min(max(value, 0.0) / most, 1.0) ** 0.5))
    return (
        f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" stroke="#ddd" '
        f'fill="rgb({light},{light},255)"><title>{name}: {value:.4f}</title></rect>'
    )
