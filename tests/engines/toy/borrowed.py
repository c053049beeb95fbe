"""The memory's own tests, for another engine."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType

from _pytest.fixtures import FixtureFunctionDefinition

TESTS = Path(__file__).parents[2]


def borrow(path: str, *, without: Collection[str] = ()) -> dict[str, object]:
    """The tests of a file that use the fixture `engine`, and the file's fixtures, by name.

    Args:
        path: within the folder of all tests.
        without: tests of what only a transformers model has.
    """
    names = vars(_module(path))
    assert names.keys() >= set(without)
    fixtures = {name: value for name, value in names.items() if isinstance(value, FixtureFunctionDefinition)}
    arguments = {name: _arguments(fixture._get_wrapped_function()) for name, fixture in fixtures.items()}

    def uses_engine(name: str) -> bool:
        return name == "engine" or any(uses_engine(argument) for argument in arguments.get(name, ()))

    tests = {
        name: value
        for name, value in names.items()
        if name.startswith("test_") and name not in without and any(map(uses_engine, _arguments(value)))
    }
    return {**fixtures, **tests}


def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"borrowed_{Path(path).stem}", TESTS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _arguments(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)
