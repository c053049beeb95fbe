"""The shape of the tree, held by reading the source: which way imports point, and how long files and functions are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "am_memory"
INTEGRATIONS = ROOT / "integrations"

# A part of am_memory imports those before it and no other, for types or inside functions neither.
ORDER = (
    *("formatting", "errors", "events", "event_log"),
    *("solver", "kv_cache"),
    "engines",
    *("policy", "budgets"),
    "text",
    "queries",
    "recall",
    "compaction",
    *("storage", "session"),
    *("memory", "conversations"),
    "cli",
)
# The same for the modules of the server.
SERVER_ORDER = (
    *("settings", "bodies", "json_bodies", "metrics"),
    *("message_schemas", "request_schemas", "responses_request", "response_schemas", "responses_events"),
    *("fair_queue", "jobs", "scheduler"),
    *("errors", "access", "connections", "sse", "requests"),
    *("kept_responses", "service", "memory_view", "updates", "chat_job"),
    *("chat_completions", "responses", "completions", "memory_endpoints", "text_endpoints", "token_endpoints"),
    *("affinity", "broadcast", "app", "serve", "ray_serve"),
)
MOST_FILES, MOST_PACKAGES = 7, 12
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 400, 60

PUBLIC_OF_ENGINES = {
    "am_memory.engines.abilities",
    "am_memory.engines.base",
    "am_memory.engines.model_files",
    "am_memory.engines.names",
}
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

    @property
    def importer(self) -> str:
        """The part of its package that imports."""
        return part_of(module_name(self.path))


def module_name(path: Path) -> str:
    root = INTEGRATIONS if INTEGRATIONS in path.parents else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    """The file or folder directly in its package: am_memory.solver.keys belongs to `solver`."""
    return [*module.split("."), ""][1]


def imports_of(path: Path) -> list[Import]:
    return list(_walk(path, TREES[path]))


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
        name = f"{base}.{alias.name}"
        yield name if name in MODULES else base


FILES = sorted(LIBRARY.rglob("*.py"))
BUILT_ON_IT = sorted(INTEGRATIONS.rglob("*.py"))
MODULES = {module_name(path) for path in (*FILES, *BUILT_ON_IT)}
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (*FILES, *BUILT_ON_IT)}
IMPORTS = [found for path in FILES for found in imports_of(path)]
OUR_IMPORTS = [found for found in IMPORTS if found.module.split(".")[0] == "am_memory"]
IMPORTS_ABOVE = [found for path in BUILT_ON_IT for found in imports_of(path)]


def test_a_newcomer_sees_few_files_and_packages() -> None:
    assert len(list(LIBRARY.glob("*.py"))) <= MOST_FILES
    assert len(list(LIBRARY.glob("*/__init__.py"))) <= MOST_PACKAGES


def test_every_part_has_its_place_in_the_order() -> None:
    """A new part of am_memory is placed in ORDER first: that is where its imports are decided."""
    assert {part_of(module_name(path)) for path in FILES} - {""} == set(ORDER)


def test_contributing_shows_this_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = text.split("```text\n")[1].split("\n```")[0].splitlines()
    assert [part for row in rows for part in row.split("  ")[0].split(", ")] == list(ORDER)


def test_imports_point_one_way() -> None:
    """Imports for types alone count as well: who names a type depends on its package."""
    assert not _against(ORDER, OUR_IMPORTS)
    server = INTEGRATIONS / "am_memory_server"
    assert {path.stem for path in server.glob("*.py")} - {"__init__"} == set(SERVER_ORDER)
    inside = [found for found in IMPORTS_ABOVE if found.path.parent == server and found.module in MODULES]
    assert not _against(SERVER_ORDER, [found for found in inside if found.module.startswith("am_memory_server.")])


def _against(order: tuple[str, ...], imports: list[Import]) -> list[str]:
    inside = [found for found in imports if found.importer and part_of(found.module)]
    return [str(one) for one in inside if order.index(part_of(one.module)) > order.index(one.importer)]


def test_no_two_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in (*OUR_IMPORTS, *IMPORTS_ABOVE):
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


def test_no_file_and_no_function_is_too_long() -> None:
    found = {one for path in TREES for one in _too_long(path)}
    assert not sorted(found), "split them"


def _too_long(path: Path) -> Iterator[str]:
    where = str(path.relative_to(ROOT))
    if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES_OF_A_FILE:
        yield where
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _length(node) > MOST_LINES_OF_A_FUNCTION:
            yield f"{where}: {node.name}"


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines, without those of the docstring and of the decorators."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    docstring = function.body[0]
    skipped = (docstring.end_lineno or 0) - docstring.lineno + 1 if body is not function.body else 0
    return (function.end_lineno or 0) - function.lineno + 1 - skipped


def test_nothing_inside_imports_the_package_itself() -> None:
    """`from am_memory import x` inside am_memory loads everything, and is a cycle."""
    assert not [str(found) for found in OUR_IMPORTS if found.module == "am_memory"]


def test_the_solver_knows_tensors_only() -> None:
    inside = [found for found in IMPORTS if found.importer == "solver"]
    assert {part_of(found.module) for found in inside if found in OUR_IMPORTS} == {"solver", "errors"}
    assert not [str(found) for found in inside if "transformers" in found.module]


def test_only_the_protocol_of_the_engines_is_imported() -> None:
    """An engine is chosen inside a function of memory or of the command line; all else sees engines.base."""
    private = [
        found
        for found in OUR_IMPORTS
        if part_of(found.module) == "engines" != found.importer and found.module not in PUBLIC_OF_ENGINES
    ]
    assert not [str(one) for one in private if not (one.is_lazy and one.importer in CHOOSES_AN_ENGINE)]


@pytest.mark.parametrize("package", sorted(NEVER_IN_THE_LIBRARY | PACKAGES_ABOVE))
def test_the_library_never_imports_what_is_built_on_it(package: str) -> None:
    found = [found for found in IMPORTS if found.module.split(".")[0] == package]
    runs = [one for one in found if not (one.is_lazy or one.is_typing)]
    assert not [str(one) for one in found if one in runs or (one.importer, package) not in STARTS]


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        if part_of(module_name(path)) != "cli"
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing


def test_integrations_are_installed_under_their_own_names() -> None:
    """Each is a package of its own, and imports the library by its public name, never `integrations`."""
    for package in ("langchain_am_memory", "am_memory_server"):
        files = sorted((INTEGRATIONS / package).rglob("*.py"))
        assert INTEGRATIONS / package / "__init__.py" in files
        assert not [str(f) for path in files for f in imports_of(path) if f.module.split(".")[0] == "integrations"]
