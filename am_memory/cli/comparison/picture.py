"""A comparison as an SVG picture: a panel of bars for each measure. Needs no library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from am_memory.cli.comparison.judge import Outcome
from am_memory.cli.comparison.ways import FULL, OURS

BAR, GAP, NAME_WIDTH, PANEL_WIDTH, TOP = 16, 8, 150, 170, 54
FIGURE_WIDTH = 62
"""Room for the figure behind a bar."""
COLOURS = {OURS: "#7c3aed", FULL: "#0f766e"}
OTHERS = "#94a3b8"

Measure = tuple[str, Callable[[Outcome], float], str]
"""The title of a panel, its value, and how the value is written."""


def measures(num_questions: int) -> Sequence[Measure]:
    """The panels from left to right."""
    known: Measure = (f"known, of {num_questions}", lambda one: one.num_right, ",.0f")
    others: Sequence[Measure] = (
        ("KL of the continuation", lambda one: one.kl, ".3f"),
        ("tokens held", lambda one: one.kv_tokens, ",.0f"),
        ("seconds to read", lambda one: one.seconds_to_read, ".1f"),
    )
    return (known, *others) if num_questions else others


def draw(outcomes: Sequence[Outcome], title: str) -> str:
    """The text of an SVG file."""
    panels = measures(len(outcomes[0].answers))
    width = NAME_WIDTH + len(panels) * PANEL_WIDTH + 10
    height = TOP + len(outcomes) * (BAR + GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="20" font-weight="bold" fill="#0f172a">{escape(title)}</text>',
    ]
    for row, outcome in enumerate(outcomes):
        place = f'x="{NAME_WIDTH - 10}" y="{TOP + row * (BAR + GAP) + BAR - 4}"'
        parts.append(f'<text {place} text-anchor="end" fill="#0f172a">{escape(outcome.name)}</text>')
    for number, measure in enumerate(panels):
        parts += panel(outcomes, measure, NAME_WIDTH + number * PANEL_WIDTH)
    return "\n".join([*parts, "</svg>\n"])


def panel(outcomes: Sequence[Outcome], measure: Measure, x: int) -> list[str]:
    """One panel: its title, and a bar with its figure for each row."""
    title, value_of, form = measure
    values = [value_of(outcome) for outcome in outcomes]
    scale = (PANEL_WIDTH - FIGURE_WIDTH) / (max(values) or 1)
    parts = [f'<text x="{x}" y="{TOP - 10}" fill="#475569">{escape(title)}</text>']
    for row, (outcome, value) in enumerate(zip(outcomes, values, strict=True)):
        y, length = TOP + row * (BAR + GAP), max(value * scale, 1)
        colour = COLOURS.get(outcome.name, OTHERS)
        parts += [
            f'<rect x="{x}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2" fill="{colour}"/>',
            f'<text x="{x + length + 5:.1f}" y="{y + BAR - 4}" fill="#0f172a">{value:{form}}</text>',
        ]
    return parts
