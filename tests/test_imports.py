"""Which packages are loaded when: torch and transformers take seconds, and a help text needs neither."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from typing import get_args

import pytest

import am_memory
from am_memory import AMMemoryError, errors, events

HEAVY = {"torch", "transformers", "numpy", "fsspec", "gguf", "jinja2", "llguidance", "tiktoken"}


def loaded_by(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after some code."""
    program = f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return HEAVY & set(result.stderr.split())


def test_importing_the_library_loads_nothing_heavy() -> None:
    assert not loaded_by("import am_memory; dir(am_memory)")


@pytest.mark.parametrize("command", ["", "demo", "chat", "serve", "calibrate", "inspect", "delete"])
def test_no_help_text_loads_anything_heavy(command: str) -> None:
    code = "from am_memory.cli.main import app\ntry: app()\nexcept SystemExit: pass"
    arguments = f"sys.argv[1:] = {[*filter(None, [command]), '--help']}"
    assert not loaded_by(f"{arguments}\n{code}")


def test_using_a_memory_loads_torch() -> None:
    """The probe itself works."""
    assert "torch" in loaded_by("from am_memory import Memory")


@pytest.mark.parametrize(
    ("package", "missing", "extra"),
    [
        ("langchain_am_memory", "langchain_core", "langchain"),
        ("langchain_am_memory", "langgraph", "langchain"),
        ("am_memory_server", "fastapi", "server"),
        ("am_memory_server", "prometheus_client", "server"),
    ],
)
def test_a_package_without_its_extra_says_what_to_install(package: str, missing: str, extra: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import {package}"
    result = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert result.stderr.rstrip().endswith(
        f"install attention-matching-memory[{extra}]; in a clone: pip install -e '.[{extra}]'"
    )


def test_every_public_name_can_be_imported_and_is_listed() -> None:
    assert set(am_memory.__all__) <= set(dir(am_memory))
    names: dict[str, object] = {}
    exec("from am_memory import *", names)
    assert set(am_memory.__all__) <= set(names)


def test_every_error_and_every_event_is_public() -> None:
    found = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, AMMemoryError)}
    found |= {event.__name__ for event in get_args(events.Event)}
    assert found <= set(am_memory.__all__)


@pytest.mark.parametrize("owner", ["Memory", "Session"])
def test_everything_that_a_public_call_returns_is_public(owner: str) -> None:
    """What a call gives can be named in an annotation without knowing in which file it lies."""
    elsewhere = {
        "Figure",
        "Iterator",
        "Literal",
        "None",
        "Tensor",
        "bool",
        "dict",
        "float",
        "int",
        "list",
        "object",
        "str",
        "tuple",
    }
    returned = set[str]()
    for name, member in vars(getattr(am_memory, owner)).items():
        call = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if inspect.isfunction(call) and not name.startswith("_"):
            returned |= set(re.findall(r"[A-Za-z]+", str(call.__annotations__["return"])))
    assert returned - elsewhere <= set(am_memory.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'am_memory' has no attribute 'Memmory'"):
        am_memory.Memmory  # type: ignore[attr-defined]  # noqa: B018
