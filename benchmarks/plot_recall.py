"""Draw docs/recall.png from what recall.py wrote.

python benchmarks/plot_recall.py ONCE.json TURNS.json docs/recall.png
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from common import drawing

COLORS = {"full cache": "#888888", "AM (default)": "#1f6fb2", "segments (ours)": "#1f6fb2"}


def shares(path: str) -> dict[tuple[str, float], list[float]]:
    groups = defaultdict(list)
    for result in json.loads(Path(path).read_text()):
        groups[result["scheme"], result["ratio"]].append(result["recalled"] / result["asked"])
    return groups


def main() -> None:
    once, turns, target = sys.argv[1:]
    titles = ("one compaction", "six compactions, one after each turn")
    with drawing(target, (10, 3.6), 2) as axes:
        for axis, path, title in zip(axes, (once, turns), titles, strict=True):
            groups = shares(path)
            names = [scheme if ratio in (1.0, float("inf")) else f"{scheme}, {ratio:.0f}x" for scheme, ratio in groups]
            colors = [COLORS.get(scheme, "#c9a36a") for scheme, _ in groups]
            means = [statistics.mean(values) for values in groups.values()]
            errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in groups.values()]
            axis.barh(names, means, xerr=errors, color=colors, ecolor="#444444", capsize=2)
            axis.invert_yaxis()
            axis.set_xlim(0, 1.05)
            axis.set_title(title, loc="left", fontsize=10)
            axis.set_xlabel("codes recalled, of those told")


if __name__ == "__main__":
    main()
