"""The tree in numbers: its size, its imports, its names and its words, a column for each checkout.

python benchmarks/house.py [ROOT ...] [--suite FILE ...]

Without a ROOT, the checkout that holds this script is measured. To compare it with an earlier one:

git worktree add /tmp/before COMMIT && python benchmarks/house.py /tmp/before .

FILE is what `make test ARGS=--junit-xml=FILE` wrote for the ROOT in the same place. A ROOT takes half a minute.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from statistics import mean, median
from xml.etree import ElementTree

HERE = Path(__file__).parent.parent
COMPACTION_TYPES = {
    *("Plan", "Order", "Pending", "Compaction", "Made", "ScheduledCompaction", "CompactionReport"),
    *("CompactionPlan", "CompactionJob", "CompactionResult", "CompactionRecord", "BackgroundCompaction"),
    *("Job", "Result", "Record"),
}
"""Names that types for one compaction have or had; those that a tree defines are counted."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
Row = tuple[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="*", type=Path, default=[HERE], metavar="ROOT")
    parser.add_argument("--suite", nargs="*", type=Path, default=[], metavar="FILE")
    given = parser.parse_args()
    columns = [dict(figures(root.resolve(), suite)) for root, suite in zip_longest(given.roots, given.suite)]
    for line in table([revision(root) for root in given.roots], columns):
        print(line)


def figures(root: Path, suite: Path | None) -> Iterator[Row]:
    yield from layout(root)
    yield from definitions(root)
    yield from words(root)
    yield from start(root)
    if suite is not None:
        yield from tests(suite)


def table(headings: list[str], columns: list[dict[str, object]]) -> Iterator[str]:
    yield " | ".join(["|", *headings, "|"]).replace("| |", "| figure |", 1)[:-2]
    yield "|---|" + "---:|" * len(columns)
    names = {name: None for column in columns for name in column}
    for name in names:
        yield "| " + " | ".join([name, *(str(column.get(name, "")) for column in columns)]) + " |"


def revision(root: Path) -> str:
    """The commit that is checked out, and whether files differ from it."""
    described = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    return subprocess.run(described, check=True, capture_output=True, text=True).stdout.strip()


def source(root: Path) -> dict[Path, ast.Module]:
    """The library and what is built on it, without tests and benchmarks."""
    files = [path for folder in ("am_memory", "integrations") for path in sorted((root / folder).rglob("*.py"))]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}


def layout(root: Path) -> Iterator[Row]:
    """Files, packages and the imports between them."""
    library, trees = root / "am_memory", source(root)
    yield "files at the top of am_memory", len(list(library.glob("*.py")))
    yield "packages at the top of am_memory", len(list(library.glob("*/__init__.py")))
    arrows = edges(library, trees)
    yield "import edges between these files and packages", len(arrows)
    yield "pairs of them that import each other", sum((b, a) in arrows for a, b in arrows) // 2
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in trees}
    longest = max(sizes, key=sizes.__getitem__)
    yield "longest file (lines)", f"{sizes[longest]} ({longest.name})"
    yield "files over 400 lines", sum(size > 400 for size in sizes.values())


def edges(library: Path, trees: dict[Path, ast.Module]) -> set[tuple[str, str]]:
    """Pairs (importer, imported) of files and packages at the top; imports for types and in functions count."""
    found = set()
    for path, tree in trees.items():
        if library not in path.parents:
            continue
        part = path.relative_to(library).parts[0].removesuffix(".py")
        found |= {(part, name.split(".")[1]) for name in imported(tree) if name.startswith("am_memory.")}
    return {(part, other) for part, other in found if part not in (other, "__init__")}


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield from (f"{base}.{alias.name}" for alias in node.names) if base == "am_memory" else [base]


def definitions(root: Path) -> Iterator[Row]:
    """Functions, classes and their docstrings."""
    trees = source(root)
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    functions = [(length(node), f"{path.name}: {node.name}") for path, node in nodes if isinstance(node, Function)]
    yield "longest function (lines without its docstring)", "{} ({})".format(*max(functions))
    yield "functions over 60 lines", sum(size > 60 for size, _ in functions)
    yield "median function (lines)", median(size for size, _ in functions)
    classes = {node.name for _, node in nodes if isinstance(node, ast.ClassDef)}
    yield "types for one compaction", len(classes & COMPACTION_TYPES)
    public = [node for tree in trees.values() for node in public_definitions(tree)]
    documented = mean(bool(ast.get_docstring(node)) for node in public)
    yield "public names with a docstring", f"{documented:.0%} of {len(public)}"
    docstrings = [
        text for _, node in nodes if isinstance(node, ast.Module | Definition) and (text := ast.get_docstring(node))
    ]
    share = mean(text.startswith(("Of ", "What ")) for text in docstrings)
    yield 'docstrings that begin with "Of" or "What"', f"{share:.1%} of {len(docstrings)}"


def length(node: Function) -> int:
    """Lines, without those of the docstring."""
    first = node.body[0]
    has_docstring = ast.get_docstring(node, clean=False) is not None
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    return lines - ((first.end_lineno or first.lineno) - first.lineno + 1 if has_docstring else 0)


def public_definitions(tree: ast.Module) -> Iterator[Definition]:
    """Functions and classes at the top, and the methods of these classes."""
    for node in tree.body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        yield node
        if isinstance(node, ast.ClassDef):
            yield from (inner for inner in node.body if isinstance(inner, Function) and not inner.name.startswith("_"))


def words(root: Path) -> Iterator[Row]:
    """README and docs, without the log of experiments."""
    files = [root / "README.md", *(page for page in sorted((root / "docs").rglob("*.md")) if page.name != "log.md")]
    readme, *others = (path.read_text(encoding="utf-8") for path in files)
    for name, pages in {"the README": [readme], "docs": others}.items():
        counts = [len(sentence.split()) for page in pages for sentence in sentences(page)]
        yield f"words a sentence in {name} (mean)", f"{mean(counts):.1f}"
        yield f"sentences over 30 words in {name}", f"{mean(count > 30 for count in counts):.0%} of {len(counts)}"
    yield "lines of the README", len(readme.splitlines())
    lines = [line for page in (readme, *others) for line in page.splitlines()]
    yield "lines over 120 characters in README and docs", sum(len(line) > 120 for line in lines)


def sentences(text: str) -> Iterator[str]:
    """The sentences of running text: no code, no tables, no headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not line.lstrip().startswith(("|", "#", "!", ">"))]
        for sentence in re.split(r"(?<=[.!?:])\s+", " ".join(lines)):
            if len(sentence.split()) > 3:
                yield sentence


def start(root: Path) -> Iterator[Row]:
    """CPU seconds of what users wait for first: the median of three."""
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    command = re.search(r'^am-memory = "([\w.]+):(\w+)"', project, flags=re.MULTILINE)
    assert command is not None
    module, function = command.groups()
    shows_help = f"import sys; sys.argv = ['am-memory', '--help']; from {module} import {function} as run; run()"
    for name, code in {"import am_memory": "import am_memory", "am-memory --help": shows_help}.items():
        yield f"{name} (CPU seconds)", f"{median(seconds(root, code) for _ in range(3)):.2f}"


def seconds(root: Path, code: str) -> float:
    """CPU time of a fresh interpreter that runs the code with the packages of that checkout."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "integrations")])}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def tests(suite: Path) -> Iterator[Row]:
    """The suite by the file that pytest wrote of it."""
    runs = list(ElementTree.parse(suite).getroot().iter("testsuite"))
    cases = [case for run in runs for case in run.iter("testcase")]
    yield "tests", len(cases)
    yield "the suite (seconds of wall time)", f"{sum(float(run.attrib['time']) for run in runs):.0f}"
    yield "the suite (seconds of all tests)", f"{sum(float(case.attrib['time']) for case in cases):.0f}"


if __name__ == "__main__":
    main()
