"""The recorded demo as an animated SVG, for README. The same record gives the same picture.

    COLUMNS=100 am-memory demo > docs/demo.txt    record a run; keep the first line, drop the next steps at its end
    python benchmarks/draw_demo.py                draw docs/demo.svg

The lines scroll through a window, as in a terminal. Who asks for less motion sees the end of the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
ROWS, LINE_HEIGHT, CHAR_WIDTH, MARGIN = 26, 17, 7.6, 16
COLUMNS = 100
FONTS = "ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"
SECONDS = (("letter ", 1.2), ("  compacted", 0.9), ("  █", 0.5), ("│", 0.25), ("", 0.1))
"""How long a line is the last one, by its beginning."""
END_SECONDS = 8.0
COLOURS = {
    "green": "✓ \\d+|ship [A-Z]\\w+ \\d+|^\\$.*|14 of 14|4 of 4",
    "red": "✗ \\w+",
    "violet": "compacted tokens [\\d,-]+ to \\d+ slots per head|^In .*|^letters alone.*",
    "cyan": "█+|\\d+/512 tokens in the cache",
    "grey": "░+|[┃│┏┓┡┩└┘├┤┌┐━─╭╮╰╯┳╇┴┼╈┻]+",
}
FILLS = {"green": "#4ade80", "red": "#f87171", "violet": "#c084fc", "cyan": "#22d3ee", "grey": "#64748b"}
COLOURED = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in COLOURS.items()))


def main() -> None:
    lines = (DOCS / "demo.txt").read_text(encoding="utf-8").splitlines()
    (DOCS / "demo.svg").write_text(draw(lines), encoding="utf-8")


def draw(lines: Sequence[str]) -> str:
    """The text of the SVG file."""
    width, height = COLUMNS * CHAR_WIDTH + 2 * MARGIN, ROWS * LINE_HEIGHT + 2 * MARGIN
    end = (ROWS - len(lines)) * LINE_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'xml:space="preserve" role="img" font-family="{FONTS}" font-size="12.6">',
        "<title>am-memory demo: letters far longer than the cache, and what the model recalls of them</title>",
        "<style>",
        f"@keyframes scroll {{ {' '.join(keyframes(lines))} }}",
        f"#lines {{ animation: scroll {duration(lines):.1f}s step-end infinite; transform: translateY({end}px) }}",
        "@media (prefers-reduced-motion: reduce) { #lines { animation: none } }",
        "text { fill: #e2e8f0 }",
        *(f".{name} {{ fill: {fill} }}" for name, fill in FILLS.items()),
        "</style>",
        f'<clipPath id="window"><rect y="{MARGIN / 2}" width="100%" height="{height - MARGIN}"/></clipPath>',
        f'<rect width="100%" height="{height}" rx="8" fill="#0f172a"/>',
        '<g clip-path="url(#window)"><g id="lines">',
        *(text(number, line) for number, line in enumerate(lines) if line.strip()),
        "</g></g></svg>\n",
    ]
    return "\n".join(parts)


def text(number: int, line: str) -> str:
    """One line, as wide as its characters are in every font."""
    line = line.rstrip()
    indent = len(line) - len(line.lstrip())
    place = f'x="{MARGIN + indent * CHAR_WIDTH:.1f}" y="{MARGIN + (number + 1) * LINE_HEIGHT - 5}"'
    length = f'textLength="{(len(line) - indent) * CHAR_WIDTH:.1f}" lengthAdjust="spacingAndGlyphs"'
    return f"<text {place} {length}>{''.join(coloured(line.lstrip()))}</text>"


def coloured(line: str) -> Iterator[str]:
    """The line in pieces, those that have a colour as spans."""
    end = 0
    for found in COLOURED.finditer(line):
        yield escape(line[end : found.start()], quote=False)
        yield f'<tspan class="{found.lastgroup}">{escape(found[0], quote=False)}</tspan>'
        end = found.end()
    yield escape(line[end:], quote=False)


def seconds_of(line: str) -> float:
    """How long the line is the last one in the window."""
    return next(seconds for start, seconds in SECONDS if line.startswith(start))


def duration(lines: Sequence[str]) -> float:
    """Seconds until the animation begins again."""
    return sum(map(seconds_of, lines)) + END_SECONDS


def keyframes(lines: Sequence[str]) -> Iterator[str]:
    """At the time of each line, the shift that makes it the last one in the window."""
    whole, now = duration(lines), 0.0
    for number, line in enumerate(lines, 1):
        yield f"{100 * now / whole:.2f}% {{ transform: translateY({(ROWS - number) * LINE_HEIGHT}px) }}"
        now += seconds_of(line)


if __name__ == "__main__":
    main()
