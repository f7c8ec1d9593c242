"""A plain line plot as SVG, both axes logarithmic."""

from __future__ import annotations

import math
from html import escape

Curves = dict[str, list[tuple[float, float]]]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 70, 180, 20, 50
COLORS = ("#1f77b4", "#d62728", "#ff7f0e", "#2ca02c", "#9467bd")


def line_plot(x_label: str, y_label: str, curves: Curves) -> str:
    """Draw curves.

    Args:
        curves: points (x, y) by name, all above 0; a curve may be empty.

    Returns:
        The SVG text.
    """
    points = [point for curve in curves.values() for point in curve]
    x_range, y_range = _decades([x for x, _ in points]), _decades([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + _share(x, x_range) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - _share(y, y_range) * (HEIGHT - TOP - BOTTOM)
        return round(right, 1), round(down, 1)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]
    for x in _marks(x_range):
        right, down = place(x, y_range[0])
        lines.append(f'<path d="M{right} {down}V{TOP}" stroke="#ddd"/>')
        lines.append(f'<text x="{right}" y="{down + 16}" text-anchor="middle">{x:g}</text>')
    for y in _marks(y_range):
        right, down = place(x_range[0], y)
        lines.append(f'<path d="M{right} {down}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        lines.append(f'<text x="{right - 6}" y="{down + 4}" text-anchor="end">{y:g}</text>')
    for index, (name, curve) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        places = [place(x, y) for x, y in sorted(curve)]
        path = " ".join(f"{right},{down}" for right, down in places)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        lines += [f'<circle cx="{right}" cy="{down}" r="3" fill="{color}"/>' for right, down in places]
        below = TOP + 16 * (index + 1)
        lines.append(f'<text x="{WIDTH - RIGHT + 12}" y="{below}" fill="{color}">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _decades(values: list[float]) -> tuple[float, float]:
    """Whole powers of ten around the values."""
    if not values:
        return 1.0, 10.0
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _share(value: float, span: tuple[float, float]) -> float:
    return math.log(value / span[0]) / math.log(span[1] / span[0])


def _marks(span: tuple[float, float]) -> list[float]:
    first, last = round(math.log10(span[0])), round(math.log10(span[1]))
    return [10.0**power for power in range(first, last + 1)]
