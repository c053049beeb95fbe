"""README and docs: every Python block runs, every command and option exists, lines are short, links lead somewhere.

A page's blocks run in order and share their names. The model "demo" is a tiny random one here, which ends its answers
early, so that all pages together take seconds.
"""

from __future__ import annotations

import inspect
import pydoc
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import am_memory_server
import langchain_am_memory
import pytest
import torch
import typer
from draw_demo import COLUMNS, draw
from serving import running
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import am_memory
from am_memory import Memory, MemoryPolicy
from am_memory.cli.main import app
from am_memory.engines.transformers import TransformersEngine

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = re.compile(r"^```(?:bash|sh|console)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
INLINE_COMMAND = re.compile(r"`((?:am-memory|make|python (?:benchmarks|tests|examples)/)[^`]*)`")
LONGEST_LINE = 120
FOLDERS = ("am_memory", "integrations", "benchmarks", "examples", "tests")
NOT_INSTALLED = {"langchain_classic", "langchain_community", "langchain_huggingface", "langchain_ollama"}
"""Packages that pages show code for to leave behind."""


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=page_name)
pages_with_python = pytest.mark.parametrize(
    "page", [page for page in PAGES[1:] if "```python" in page.read_text(encoding="utf-8")], ids=page_name
)


# Code


@pytest.fixture
def memory_of_tiny_model(
    new_tiny_model: Any, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TransformersEngine]:
    """What pages load is this model, which ends an answer after a few tokens; options are checked all the same."""
    model = new_tiny_model()
    model.config.max_position_embeddings = 65536

    def end_soon(module: torch.nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_add(
            -1, torch.tensor([model.config.eos_token_id]), logits.new_full((*logits.shape[:-1], 1), 4)
        )

    model.lm_head.register_forward_hook(end_soon)
    engine = TransformersEngine(model, byte_tokenizer)
    signature = inspect.signature(Memory.from_pretrained)

    def from_pretrained(cls: type[Memory], *args: Any, **options: Any) -> Memory:
        given = signature.bind(*args, **options).arguments
        return cls(engine, **{name: given[name] for name in ("policy", "store", "on_event") if name in given})

    monkeypatch.setattr(Memory, "from_pretrained", classmethod(from_pretrained))
    yield engine


@pages_with_python
@pytest.mark.model
def test_every_python_block_runs(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama_cpp.md on the bundled model itself, as a tiny one cannot be kept in 8 bits; README has a test of its own."""
    text = page.read_text(encoding="utf-8")
    if page.name != "llama_cpp.md":
        engine = request.getfixturevalue("memory_of_tiny_model")
    monkeypatch.chdir(tmp_path)
    names = NAMES.get(page.name, dict)()
    if "http://127.0.0.1:8000" not in text:
        return run_blocks(text, tmp_path / page.name, names)
    policy = MemoryPolicy(trigger_tokens=1024, keep_ratio=0.25)
    with running(Memory(engine, policy), model_name="demo") as server:
        run_blocks(text.replace("http://127.0.0.1:8000", server.url), tmp_path / page.name, names)


@pytest.mark.model
def test_the_examples_of_readme_compact_and_know_the_code_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand, on the bundled model; only the server has another port."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    memory = Memory.from_pretrained("demo", policy=MemoryPolicy(trigger_tokens=512))
    with running(memory, model_name="demo") as server:
        run_blocks(text.replace("http://127.0.0.1:8000", server.url), tmp_path / "README.md", {})
    shown = capsys.readouterr().out
    _, plain, generated, *threads = re.split(r"(?m)^(?=DynamicCache|The code of the safe is 4821\.  ->)", shown)
    assert len(threads) == 2
    for example in (plain, *threads):
        assert example.count("What is the code of the safe?  -> The code of the safe is 4821") == 2
        told, before, read, after = map(int, re.findall(r", (\d+) compactions?\]", example))
        assert told == before == 0 < read <= after
    assert re.search(r"KVCache: .*4821.*\n<KVCache: 7\d\d tokens in [45]\d\d slots", generated)


def run_blocks(text: str, copy: Path, names: dict[str, Any]) -> None:
    copy.write_text(text, encoding="utf-8")
    document = Sybil(parsers=[PythonCodeBlockParser()], path=str(copy.parent)).parse(copy)
    document.namespace.update(names)
    for example in document:
        try:
            example.evaluate()
        except ModuleNotFoundError as error:
            if error.name not in NOT_INSTALLED:
                raise


def names_of_langchain() -> dict[str, Any]:
    """The models that the page's reader has already."""
    engine = Memory.from_pretrained("demo").engine
    return {
        "hf_model": engine.model,
        "hf_tokenizer": engine.tokenizer,
        "llm": langchain_am_memory.ChatAMMemory(model="demo"),
    }


NAMES = {"langchain.md": names_of_langchain}
"""What a page's code takes for granted, by page."""


def test_the_picture_of_the_demo_is_drawn_from_its_record() -> None:
    docs = ROOT / "docs"
    record = (docs / "demo.txt").read_text(encoding="utf-8").splitlines()
    picture = (docs / "demo.svg").read_text(encoding="utf-8")
    assert picture == draw(record)
    assert len(picture) < 30_000
    assert max(map(len, record)) <= COLUMNS


# Commands


@every_page
def test_commands_and_their_options_exist(page: Path) -> None:
    for command in commands(page.read_text(encoding="utf-8")):
        assert unknown(command) is None, f"{command!r}: {unknown(command)}"


def commands(text: str) -> Iterator[str]:
    """Those in blocks without a language or of a shell, and those in a line of text."""
    for block in SHELL.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    for command in INLINE_COMMAND.findall(FENCE.sub("", text)):
        yield " ".join(command.split())


def unknown(command: str) -> str | None:
    """What of a command does not exist; None also for commands that are not ours."""
    try:
        words = [word for word in shlex.split(command, comments=True) if "=" not in word or word.startswith("-")]
    except ValueError:
        return None
    match words:
        case ["am-memory", name, *rest]:
            known = cli_options()
            if name.startswith("-"):
                return None if name == "--help" else name
            return f"no command {name}" if name not in known else unknown_option(rest, known[name])
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            return next((target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)), None)
        case ["python", script, *rest] if script.endswith(".py"):
            if not (ROOT / script).is_file():
                return f"no file {script}"
            return unknown_option(rest, script_options(ROOT / script))
    return None


def unknown_option(words: list[str], known: set[str]) -> str | None:
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return next((option for option in options if option not in known), None)


@cache
def cli_options() -> dict[str, set[str]]:
    group = typer.main.get_command(app)
    return {
        name: {
            "--help",
            *(option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)),
        }
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


@cache
def script_options(script: Path) -> set[str]:
    """Every string that looks like an option in a script, and in what it imports of its folder."""
    sources = [script.read_text(encoding="utf-8")]
    sources += [path.read_text(encoding="utf-8") for path in [script.with_name("common.py")] if path.is_file()]
    return {"--help", *re.findall(r'"(--[a-z0-9-]+)"', "\n".join(sources))}


@pytest.mark.parametrize("package", [am_memory, langchain_am_memory, am_memory_server], ids=lambda each: each.__name__)
def test_every_public_name_is_on_the_api_page(package: Any) -> None:
    """By itself, or in a module that is shown whole."""
    shown = set(re.findall(r"^::: ([\w.]+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    modules = [sys.modules[name] for name in shown & set(sys.modules)]
    missing = {name for name in package.__all__ if not any(hasattr(module, name) for module in modules)}
    assert missing <= {name.rpartition(".")[2] for name in shown if name.startswith(package.__name__)}


@every_page
def test_files_and_names_of_the_code_exist(page: Path) -> None:
    """The log and the changelog tell of files as they were."""
    if page.name == "log.md":
        return
    text = page.read_text(encoding="utf-8")
    files = {f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    named = set(re.findall(r"[`/]([\w/]*\w\.py)\b", FENCE.sub("", text)))
    assert not [name for name in named if not any(file.endswith(f"/{name.lstrip('/')}") for file in files)]
    assert not [name for name in re.findall(r"`(am_memory(?:\.\w+)+)`", text) if pydoc.locate(name) is None]


def test_every_package_is_in_the_architecture() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {f"`{path.parent.name}/`" for path in (ROOT / "am_memory").glob("*/__init__.py")}
    assert not {package for package in packages if f"| {package} |" not in page}


# Words


@every_page
def test_lines_are_short(page: Path) -> None:
    """Rows of tables, code and links that no line could hold are as long as they are."""
    text = FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text(encoding="utf-8"))
    long = [
        number
        for number, line in enumerate(text.splitlines(), start=1)
        if len(line) > LONGEST_LINE and not line.lstrip().startswith("|") and max(map(len, line.split())) < 80
    ]
    assert not long, f"{page_name(page)} has lines over {LONGEST_LINE} characters: {long}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=page_name)
def test_links_of_pages_outside_the_site_lead_somewhere(page: Path) -> None:
    """`make docs` checks the links of docs/ itself."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        path = ROOT / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
