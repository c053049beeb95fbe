"""The direction of the imports, held by reading the source: a lower layer never knows a higher one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "am_memory"
INTEGRATIONS = ROOT / "integrations"

# From the bottom up; a part may import its own layer and those below.
LAYERS: tuple[set[str], ...] = (
    {"errors", "events"},
    {"solver", "kv_cache"},
    {"engines"},
    {"policy"},
    {"budgets", "text"},
    {"queries"},
    {"recall"},
    {"compaction"},
    {"storage"},
    {"session"},
    {"memory"},
    {"conversations"},
    {"cli"},
)
LAYER_OF = {part: level for level, parts in enumerate(LAYERS) for part in parts}

SOLVER_MAY_IMPORT = {"solver", "errors"}
PUBLIC_OF_ENGINES = {"am_memory.engines.base", "am_memory.engines.names"}
CHOOSES_AN_ENGINE = {"memory", "cli"}  # inside a function only: a heavy engine loads when asked for
NEVER_IN_THE_LIBRARY = {"langchain", "langchain_core", "langgraph", "fastapi", "starlette", "uvicorn", "ray"}
STARTS = {("cli", "am_memory_server")}  # inside a function only: a command starts what is built on the library
PACKAGES_ABOVE = {"langchain_am_memory", "am_memory_server", "integrations", "examples", "benchmarks", "tests"}


@dataclass(frozen=True)
class Import:
    """One import: lazy inside a function, typing under TYPE_CHECKING."""

    path: Path
    line: int
    module: str
    is_lazy: bool
    is_typing: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def part_of(module: str) -> str:
    """The file or folder directly in am_memory: am_memory.solver.keys belongs to `solver`."""
    return [*module.split("."), ""][1]


def imports_of(path: Path) -> list[Import]:
    return list(_walk(path, ast.parse(path.read_text(encoding="utf-8"))))


def _walk(path: Path, node: ast.AST, *, is_lazy: bool = False, is_typing: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(path, child.lineno, alias.name, is_lazy, is_typing)
        elif isinstance(child, ast.ImportFrom):
            for name in _modules_named(path, child):
                yield Import(path, child.lineno, name, is_lazy, is_typing)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_guard = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from _walk(path, child, is_lazy=is_lazy or is_function, is_typing=is_typing or is_guard)


def _modules_named(path: Path, node: ast.ImportFrom) -> Iterator[str]:
    """`from a import b` names a.b where that is a module of ours, else a."""
    base = node.module or ""
    if node.level:
        package = module_name(path).split(".")
        if path.name != "__init__.py":
            package = package[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
    for alias in node.names:
        below = ROOT.joinpath(*base.split("."), alias.name)
        is_module = below.with_suffix(".py").is_file() or (below / "__init__.py").is_file()
        yield f"{base}.{alias.name}" if is_module else base


FILES = sorted(LIBRARY.rglob("*.py"))
IMPORTS = [found for path in FILES for found in imports_of(path)]
OUR_IMPORTS = [found for found in IMPORTS if found.module.split(".")[0] == "am_memory"]


def test_every_module_has_a_layer() -> None:
    """A new part of am_memory is placed in LAYERS first: that is where its imports are decided."""
    parts = {part_of(module_name(path)) for path in FILES} - {""}
    assert parts <= set(LAYER_OF), f"give a layer in tests/test_structure.py to {sorted(parts - set(LAYER_OF))}"


def test_imports_go_down() -> None:
    """Imports for types alone count as well: who names a type depends on its package."""
    wrong = [
        str(found)
        for found in OUR_IMPORTS
        if (importer := part_of(module_name(found.path)))
        and LAYER_OF.get(part_of(found.module), len(LAYERS)) > LAYER_OF.get(importer, len(LAYERS))
    ]
    assert not wrong


def test_nothing_inside_imports_the_package_itself() -> None:
    """`from am_memory import x` inside am_memory loads everything, and is a cycle."""
    assert not [str(found) for found in OUR_IMPORTS if found.module == "am_memory"]


def test_the_solver_knows_tensors_only() -> None:
    inside = [found for found in OUR_IMPORTS if part_of(module_name(found.path)) == "solver"]
    assert not [str(found) for found in inside if part_of(found.module) not in SOLVER_MAY_IMPORT]
    assert not [str(f) for f in IMPORTS if part_of(module_name(f.path)) == "solver" and "transformers" in f.module]


def test_only_the_protocol_of_the_engines_is_imported() -> None:
    """An engine is chosen inside a function of memory or of the command line; all else sees engines.base."""
    wrong = []
    for found in OUR_IMPORTS:
        importer = part_of(module_name(found.path))
        if importer == "engines" or part_of(found.module) != "engines" or found.module in PUBLIC_OF_ENGINES:
            continue
        if not (found.is_lazy and importer in CHOOSES_AN_ENGINE):
            wrong.append(str(found))
    assert not wrong


def test_no_two_packages_import_each_other() -> None:
    graph: dict[str, set[str]] = {part: set() for part in LAYER_OF}
    for found in OUR_IMPORTS:
        if (importer := part_of(module_name(found.path))) and importer != part_of(found.module):
            graph.setdefault(importer, set()).add(part_of(found.module))
    assert not _cycle(graph)


def test_no_two_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {module_name(path): set() for path in FILES}
    for found in OUR_IMPORTS:
        importer = module_name(found.path)
        runs = not (found.is_lazy or found.is_typing)
        if runs and not importer.startswith(found.module):  # a package's __init__ gathers its own modules
            graph[importer].add(found.module)
    assert not _cycle(graph)


def _cycle(graph: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for imported in sorted(graph.get(module, ())):
            if cycle := visit(imported, [*trail, module]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in graph if (cycle := visit(module, []))), [])


@pytest.mark.parametrize("package", sorted(NEVER_IN_THE_LIBRARY | PACKAGES_ABOVE))
def test_the_library_never_imports_what_is_built_on_it(package: str) -> None:
    found = [found for found in IMPORTS if found.module.split(".")[0] == package]
    assert not [str(one) for one in found if not (one.is_lazy and (part_of(module_name(one.path)), package) in STARTS)]


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        if part_of(module_name(path)) != "cli"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing


def test_integrations_are_installed_under_their_own_names() -> None:
    """Each is a package of its own, and imports the library by its public name, never `integrations`."""
    for package in ("langchain_am_memory", "am_memory_server"):
        files = sorted((INTEGRATIONS / package).rglob("*.py"))
        assert INTEGRATIONS / package / "__init__.py" in files
        assert not [str(f) for path in files for f in imports_of(path) if f.module.split(".")[0] == "integrations"]
