"""The tree in numbers: its size, its imports, its names and its words.

python benchmarks/house.py [ROOT]    of the checkout at ROOT (this one where none is named); a few seconds
"""

from __future__ import annotations

import argparse
import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median

HERE = Path(__file__).parent.parent
COMPACTION_WORDS = (
    "Plan",
    "Order",
    "Pending",
    "Compaction",
    "Made",
    "ScheduledCompaction",
    "CompactionReport",
    "CompactionPlan",
    "CompactionJob",
    "CompactionResult",
    "CompactionRecord",
    "BackgroundCompaction",
)
"""What types for one compaction have been called; those that a tree defines are counted."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=HERE)
    root: Path = parser.parse_args().root.resolve()
    for name, value in (*code(root), *words(root), *start(root)):
        print(f"| {name} | {value} |")


def code(root: Path) -> Iterator[tuple[str, object]]:
    """Files, imports and definitions of the library and its integrations."""
    library = root / "am_memory"
    files = [path for folder in (library, root / "integrations") for path in sorted(folder.rglob("*.py"))]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    yield "files at the top of am_memory", len(list(library.glob("*.py")))
    yield "packages at the top of am_memory", len(list(library.glob("*/__init__.py")))
    yield "import edges between the parts of am_memory", len(edges(library, trees))
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    longest = max(files, key=sizes.__getitem__)
    yield "longest file (lines)", f"{sizes[longest]} ({longest.relative_to(root)})"
    yield "files over 400 lines", sum(size > 400 for size in sizes.values())
    functions = [
        (length(node), f"{path.stem}.{node.name}")
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, Function)
    ]
    yield "longest function (lines without its docstring)", "{} ({})".format(*max(functions))
    yield "functions over 60 lines", sum(size > 60 for size, _ in functions)
    yield "median function (lines)", median(size for size, _ in functions)
    classes = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    yield "types for one compaction", len(classes & set(COMPACTION_WORDS))
    public = [node for tree in trees.values() for node in public_definitions(tree)]
    yield (
        "public names with a docstring",
        f"{mean(bool(ast.get_docstring(node)) for node in public):.0%} of {len(public)}",
    )
    said = [text for tree in trees.values() for text in docstrings(tree)]
    share = mean(text.startswith(("Of ", "What ")) for text in said)
    yield 'docstrings that begin with "Of" or "What"', f"{share:.1%} of {len(said)}"


def edges(library: Path, trees: dict[Path, ast.Module]) -> set[tuple[str, str]]:
    """Between which two files or folders at the top of the library there are imports, those in functions among them."""
    found = set()
    for path, tree in trees.items():
        if library not in path.parents:
            continue
        part = path.relative_to(library).parts[0].removesuffix(".py")
        for node in ast.walk(tree):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {(part, name.split(".")[1]) for name in modules if name.startswith("am_memory.")}
    return {(part, other) for part, other in found if part != other}


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


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | Definition) and (text := ast.get_docstring(node)):
            yield text


def words(root: Path) -> Iterator[tuple[str, object]]:
    """README and docs, without the log."""
    pages = [root / "README.md", *(page for page in sorted((root / "docs").rglob("*.md")) if page.name != "log.md")]
    counts = [len(sentence.split()) for page in pages for sentence in sentences(page.read_text(encoding="utf-8"))]
    yield "words a sentence in README and docs (mean)", f"{mean(counts):.1f}"
    yield "sentences over 30 words", f"{mean(count > 30 for count in counts):.0%} of {len(counts)}"
    readme, *others = (page.read_text(encoding="utf-8").splitlines() for page in pages)
    yield "lines of the README", len(readme)
    yield (
        "lines over 120 characters in README and docs",
        sum(len(line) > 120 for page in (readme, *others) for line in page),
    )


def sentences(text: str) -> Iterator[str]:
    """Of running text: no code, no tables, no headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not line.lstrip().startswith(("|", "#", "!", ">"))]
        for sentence in re.split(r"(?<=[.!?:])\s+", " ".join(lines)):
            if len(sentence.split()) > 3:
                yield sentence


def start(root: Path) -> Iterator[tuple[str, object]]:
    """CPU seconds of what users wait for first: the median of three."""
    for name, arguments in {
        "import am_memory": ["-c", "import am_memory"],
        "am-memory --help": ["-m", "am_memory.cli.main", "--help"],
    }.items():
        yield f"{name} (CPU seconds)", f"{median(seconds(root, arguments) for _ in range(3)):.2f}"


def seconds(root: Path, arguments: list[str]) -> float:
    """CPU time of one run of Python there."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=root, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
