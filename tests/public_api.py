"""The public names of all three packages as text, and the file that they are compared with.

python tests/public_api.py    writes tests/public_api.txt again: a public name has been changed on purpose
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import am_memory_server
import click
import langchain_am_memory
import typer
from pydantic import BaseModel

import am_memory
from am_memory.cli.main import app
from am_memory.engines.base import Engine

STORED = Path(__file__).with_suffix(".txt")
OF_FASTAPI = {"HTTPValidationError", "ValidationError"}
OURS = tuple(package.__name__ for package in (am_memory, langchain_am_memory, am_memory_server))


def describe(engine: Engine) -> str:
    """One line for each name that a user of the library, LangChain, the server or the command line can write."""
    parts = [*map(_package, (am_memory, langchain_am_memory, am_memory_server)), _endpoints(engine), _commands()]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _package(package: Any) -> Iterator[str]:
    yield f"# {package.__name__}"
    for name in sorted(package.__all__):
        found = getattr(package, name)
        if inspect.isclass(found):
            yield from _class(name, found)
        elif inspect.isfunction(found):
            yield f"def {name}{_signature(found)}"
        else:
            yield name


def _class(name: str, found: type) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in found.__bases__ if base is not object)
    yield f"class {name}({bases})"
    ours = [base for base in found.__mro__ if base.__module__.split(".")[0] in OURS]
    if "__init__" in vars(found) and not _has_fields(found):
        yield f"    def __init__{_signature(found.__init__)}"
    members = {key: value for base in reversed(ours) for key, value in vars(base).items() if not key.startswith("_")}
    fields = {key: str(kind) for base in reversed(ours) for key, kind in inspect.get_annotations(base).items()}
    for key, kind in fields.items():
        if not key.startswith("_") and not kind.startswith("ClassVar"):
            yield f"    {key}: {kind}{_default(found, key)}"
    for key in sorted(_attributes(found) - set(fields) - set(members)):
        yield f"    {key}"
    for key, member in sorted(members.items()):
        if line := _member(key, member):
            yield f"    {line}"


def _has_fields(found: type) -> bool:
    return issubclass(found, BaseModel) or dataclasses.is_dataclass(found)


def _member(name: str, member: Any) -> str | None:
    match member:
        case property():
            return f"property {name} -> {inspect.signature(member.fget).return_annotation}"
        case classmethod() | staticmethod():
            return f"{type(member).__name__} {name}{_signature(member.__func__)}"
        case _ if inspect.isfunction(member):
            return f"def {name}{_signature(member)}"
    return None


class _AsWritten(str):
    """Prints without quotes: annotations are strings here."""

    __repr__ = str.__str__


def _signature(function: Any) -> str:
    found = inspect.signature(inspect.unwrap(function))
    parameters = [
        parameter.replace(annotation=_written(parameter.annotation), default=_named(parameter.default))
        for parameter in found.parameters.values()
    ]
    return str(found.replace(parameters=parameters, return_annotation=_written(found.return_annotation)))


def _named(default: Any) -> Any:
    return _AsWritten(default.__name__) if inspect.isfunction(default) else default


def _written(annotation: Any) -> Any:
    return _AsWritten(annotation) if isinstance(annotation, str) else annotation


def _default(found: type, name: str) -> str:
    if issubclass(found, BaseModel):
        field = found.model_fields[name]
        alias = f"  (alias {field.validation_alias})" if field.validation_alias else ""
        return ("" if field.is_required() else f" = {field.get_default(call_default_factory=True)!r}") + alias
    value = vars(found).get(name, inspect.Parameter.empty)
    return f" = {value!r}" if isinstance(value, int | float | str | tuple | bool | None) else ""


def _attributes(found: type) -> set[str]:
    """Names without underscore that `__init__` sets on the object."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(found))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        node.attr
        for method in tree.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and not node.attr.startswith("_")
    }


def _endpoints(engine: Engine) -> Iterator[str]:
    """Paths with their methods and parameters, and the fields of what is sent and answered."""
    yield "# the server's OpenAPI description"
    memory = am_memory.Memory(engine, am_memory.MemoryPolicy(trigger_tokens=1024))
    described = am_memory_server.create_app(memory).openapi()
    for path, methods in sorted(described["paths"].items()):
        for method, operation in sorted(methods.items()):
            parameters = [f"{one['in']} {one['name']}" for one in operation.get("parameters", ())]
            yield " ".join([method.upper(), path, *([f"({', '.join(parameters)})"] if parameters else [])])
    for name, schema in sorted(described["components"]["schemas"].items()):
        if name not in OF_FASTAPI:
            yield f"{name}: {', '.join(schema.get('properties', ())) or schema.get('type', 'anything')}"


def _commands() -> Iterator[str]:
    yield "# the command line"
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group | typer.core.TyperGroup)
    for name, command in sorted(group.commands.items()):
        yield f"am-memory {name}"
        for parameter in sorted(command.params, key=lambda one: one.opts[0] if one.param_type_name == "option" else ""):
            spelled = "/".join([*parameter.opts, *parameter.secondary_opts])
            yield f"    {spelled} = {parameter.default!r}"


if __name__ == "__main__":
    from conftest import random_llama, tokenizer_of_bytes

    from am_memory.engines.transformers import TransformersEngine

    STORED.write_text(describe(TransformersEngine(random_llama(), tokenizer_of_bytes())), encoding="utf-8")
