"""Charts: lines with 95% intervals, as small SVG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from ..agents.evaluation import Interval
from ..agents.store.folder import write_text

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 560, 320, 56, 40, 16, 48
COLOURS = ("#2a6fbb", "#c8553d", "#3c8d5a", "#7a5aa6")


def save_chart(path: Path, title: str, axis: str, series: Mapping[str, Sequence[tuple[str, Interval]]]) -> None:
    """Shares of 1 with their intervals, over the places that the first series names, evenly spaced."""
    places = [place for place, _ in next(iter(series.values()))]
    step = (WIDTH - LEFT - RIGHT) / len(places)
    x = {place: LEFT + step * (i + 0.5) for i, place in enumerate(places)}
    parts = [_text(WIDTH / 2, 22, title, "middle", 15), _text(WIDTH / 2, HEIGHT - 10, axis, "middle")]
    for tenth in range(0, 11, 2):
        y = _y(tenth / 10)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#8884"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{tenth * 10}%", "end"))
    parts += [_text(x[place], HEIGHT - BOTTOM + 18, place, "middle") for place in places]
    for number, (name, points) in enumerate(series.items()):
        colour, shift = COLOURS[number % len(COLOURS)], 4 * (number - (len(series) - 1) / 2)
        at = [(x[place] + shift, interval) for place, interval in points]
        line = " ".join(f"{px:.1f},{_y(interval.mean):.1f}" for px, interval in at)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for px, (mean, low, high) in at:
            ends = f'x1="{px:.1f}" y1="{_y(low):.1f}" x2="{px:.1f}" y2="{_y(high):.1f}"'
            parts.append(f'<line {ends} stroke="{colour}" stroke-width="1.5"/>')
            parts.append(f'<circle cx="{px:.1f}" cy="{_y(mean):.1f}" r="3.5" fill="{colour}"/>')
        if len(series) > 1:
            parts.append(f'<rect x="{LEFT + 8}" y="{TOP + 4 + 18 * number}" width="12" height="12" fill="{colour}"/>')
            parts.append(_text(LEFT + 26, TOP + 14 + 18 * number, name, "start"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    style = 'font-family="sans-serif" font-size="12" fill="#888"'
    write_text(path, "\n".join([f"{head} {style}>", *parts, "</svg>"]) + "\n")


def _y(share: float) -> float:
    return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    shown = escape("".join(character for character in text if character.isprintable()))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{shown}</text>'
