"""A picture of what a session holds of its conversation, for notebooks. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from am_memory.errors import UnsupportedOperation, how_to_install
from am_memory.formatting import mebibytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from am_memory.session.context import Context

COLOURS = {"pinned": "#0f766e", "compact": "#7c3aed", "recalled": "#d97706", "exact": "#0f766e"}


class Held(NamedTuple):
    """The tokens [start, end), and how much of them the cache holds.

    Attributes:
        kind: "pinned", "compact", "recalled" or "exact".
        share: slots per token; 1 for exact tokens.
    """

    kind: str
    start: int
    end: int
    share: float


def held_by(context: Context) -> Iterator[Held]:
    """All tokens in their order; recalled pages stand over their segments."""
    cache, sizes = context.cache, context.sizes
    if sizes.num_pinned:
        yield Held("pinned", 0, min(sizes.num_pinned, cache.num_tokens), 1.0)
    for segment in cache.segments:
        share = segment.num_slots / cache.num_heads / segment.num_tokens
        yield Held("compact", segment.start, segment.end, share)
    for recalled in context.recalled:
        if recalled.page.start >= 0:
            yield Held("recalled", recalled.page.start, recalled.page.end, 1.0)
    if sizes.exact_start < cache.num_tokens:
        yield Held("exact", sizes.exact_start, cache.num_tokens, 1.0)


def draw(context: Context) -> Figure:
    """The share of each part of the conversation that the cache holds, from the oldest token to the newest.

    Raises:
        UnsupportedOperation: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UnsupportedOperation(f"a picture needs matplotlib: {how_to_install('bench')}") from error
    cache, parts = context.cache, [*held_by(context)]
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    axis = figure.subplots()
    for kind, colour in COLOURS.items():
        some: Sequence[Held] = [part for part in parts if part.kind == kind]
        starts, widths = [part.start for part in some], [part.end - part.start for part in some]
        label = kind if some and kind != "pinned" else None
        axis.bar(
            starts, [part.share for part in some], widths, align="edge", color=colour, label=label, ec="white", lw=0.5
        )
    axis.set(xlabel="tokens of the conversation", ylabel="slots per token", xlim=(0, max(cache.num_tokens, 1)))
    axis.set_title(
        f"{context.name}: {len(context.tokens):,} tokens in {cache.kv_tokens:,.0f} slots, {mebibytes(cache.nbytes)}",
        fontsize=10,
    )
    if any(part.kind != "pinned" for part in parts):
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
