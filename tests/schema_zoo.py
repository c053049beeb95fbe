"""JSON schemas as programs send them: those that pydantic writes of its types, those in the form of OpenAI, others."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import ipaddress
import pathlib
import re
import typing
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, Optional, TypeVar

import annotated_types
import pydantic
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import NotRequired, Required, TypedDict


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Size(enum.IntEnum):
    SMALL = 1
    LARGE = 2


class Mixed(enum.Enum):
    ONE = 1
    TWO = "two"
    NONE = None


class Point(typing.NamedTuple):
    x: int
    y: float = 0.0


class Movie(TypedDict):
    name: str
    year: NotRequired[int]


class Partial(TypedDict, total=False):
    name: Required[str]
    rating: Annotated[float, Field(ge=0, le=5)]


@dataclasses.dataclass
class Plain:
    a: int
    b: list[str] = dataclasses.field(default_factory=list)


@pydantic.dataclasses.dataclass
class Checked:
    a: Annotated[int, Field(gt=0)]


class Address(BaseModel):
    """Where somebody lives."""

    street: str = Field(description="With the number.", examples=["Elm 3"])
    zip: Annotated[str, Field(pattern=r"^\d{5}$")]


class Person(BaseModel):
    name: str
    age: int | None = None
    home: Address
    others: list[Address] = []
    by_name: dict[str, Address] = {}


class Node(BaseModel):
    value: int
    children: list[Node] = []


class Tree(BaseModel):
    left: Tree | None = None
    right: Optional[Tree] = None  # noqa: UP045  # as old programs write it


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int


class Aliased(BaseModel):
    inner: Annotated[int, Field(alias="outerName")]


class Computed(BaseModel):
    a: int

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return 2 * self.a


T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    items: list[T]
    next: int | None = None


class Root(pydantic.RootModel[list[int]]):
    pass


OF_PYDANTIC: dict[str, Any] = {
    "Any": Any, "None": None, "bool": bool, "int": int, "float": float, "str": str, "bytes": bytes, "complex": complex,
    "StrictInt": pydantic.StrictInt, "PositiveInt": pydantic.PositiveInt, "NonNegativeFloat": pydantic.NonNegativeFloat,
    "conint": Annotated[int, Field(ge=-3, lt=12, multiple_of=3)], "confloat": Annotated[float, Field(gt=0.5, le=9.75)],
    "constr": Annotated[str, Field(min_length=2, max_length=5)], "pattern": Annotated[str, Field(pattern=r"^[A-Z]{2}-\d+$")],
    "lookahead": Annotated[str, pydantic.WithJsonSchema({"type": "string", "pattern": r"^(?=.*\d)[a-z\d]{4,8}$"})],
    "conlist": Annotated[list[int], Field(min_length=1, max_length=3)], "FiniteFloat": pydantic.FiniteFloat,
    "AllowInfNan": Annotated[float, Field(allow_inf_nan=True)], "Fraction": fractions.Fraction,
    "Decimal": decimal.Decimal, "condecimal": Annotated[decimal.Decimal, Field(max_digits=5, decimal_places=2)],
    "datetime": datetime.datetime, "date": datetime.date, "time": datetime.time, "timedelta": datetime.timedelta,
    "AwareDatetime": pydantic.AwareDatetime, "PastDate": pydantic.PastDate, "FutureDatetime": pydantic.FutureDatetime,
    "UUID": uuid.UUID, "UUID1": pydantic.UUID1, "UUID4": pydantic.UUID4, "UUID5": pydantic.UUID5, "UUID7": pydantic.UUID7,
    "Path": pathlib.Path, "PurePath": pathlib.PurePosixPath, "FilePath": pydantic.FilePath, "NewPath": pydantic.NewPath,
    "DirectoryPath": pydantic.DirectoryPath, "ByteSize": pydantic.ByteSize, "ImportString": pydantic.ImportString,
    "Json": pydantic.Json, "Json[list[int]]": pydantic.Json[list[int]],
    "SecretStr": pydantic.SecretStr, "SecretBytes": pydantic.SecretBytes, "Secret": pydantic.Secret[int],
    "Base64Str": pydantic.Base64Str, "Base64Bytes": pydantic.Base64Bytes, "Base64UrlStr": pydantic.Base64UrlStr,
    "AnyUrl": pydantic.AnyUrl, "HttpUrl": pydantic.HttpUrl, "FileUrl": pydantic.FileUrl, "FtpUrl": pydantic.FtpUrl,
    "AnyWebsocketUrl": pydantic.AnyWebsocketUrl, "PostgresDsn": pydantic.PostgresDsn, "RedisDsn": pydantic.RedisDsn,
    "MongoDsn": pydantic.MongoDsn, "KafkaDsn": pydantic.KafkaDsn, "AmqpDsn": pydantic.AmqpDsn, "NatsDsn": pydantic.NatsDsn,
    "MySQLDsn": pydantic.MySQLDsn, "ClickHouseDsn": pydantic.ClickHouseDsn, "SnowflakeDsn": pydantic.SnowflakeDsn,
    "IPvAnyAddress": pydantic.IPvAnyAddress, "IPvAnyInterface": pydantic.IPvAnyInterface, "IPvAnyNetwork": pydantic.IPvAnyNetwork,
    "IPv4Address": ipaddress.IPv4Address, "IPv6Address": ipaddress.IPv6Address, "IPv4Network": ipaddress.IPv4Network,
    "IPv6Interface": ipaddress.IPv6Interface, "re.Pattern": re.Pattern, "Pattern[str]": typing.Pattern[str],
    "list": list, "list[int]": list[int], "list[list[str]]": list[list[str]], "Sequence": Sequence[int], "deque": collections.deque[int],
    "set[str]": set[str], "frozenset[int]": frozenset[int], "set[Colour]": set[Colour], "tuple": tuple, "tuple[int, str]": tuple[int, str],
    "tuple[int, ...]": tuple[int, ...], "tuple[()]": tuple[()], "NamedTuple": Point, "dict": dict, "dict[str, int]": dict[str, int],
    "dict[Literal, int]": dict[Literal["a", "b"], int], "dict[Colour, str]": dict[Colour, str], "dict[int, str]": dict[int, str],
    "dict[UUID, int]": dict[uuid.UUID, int], "dict[date, int]": dict[datetime.date, int], "Mapping": Mapping[str, float],
    "dict[constr, int]": dict[Annotated[str, Field(min_length=2)], int], "defaultdict": collections.defaultdict[str, list[int]],
    "dict[pattern, int]": dict[Annotated[str, Field(pattern="^[a-z]+$")], int], "OrderedDict": collections.OrderedDict[str, int],
    "Counter": collections.Counter[str], "condict": Annotated[dict[str, int], annotated_types.Len(1, 3)],
    "Enum": Colour, "IntEnum": Size, "mixed Enum": Mixed, "Literal": Literal["a", 1, None, True], "Optional[int]": int | None,
    "Union": int | str | list[bool], "left to right": Annotated[int | str, Field(union_mode="left_to_right")],
    "TypedDict": Movie, "Partial": Partial, "dataclass": Plain, "pydantic dataclass": Checked, "nested": Person, "recursive": Node,
    "doubly recursive": Tree, "discriminated": Annotated[Cat | Dog, Field(discriminator="kind")], "list of discriminated":
    list[Annotated[Cat | Dog, Field(discriminator="kind")]], "extra allow": Open, "extra forbid": Closed, "alias": Aliased,
    "computed": Computed, "generic": Page[Colour], "root": Root, "Annotated": Annotated[int, "a note"], "default": Annotated[int, Field(default=3)],
    "constrained in union": Annotated[int, Field(ge=0)] | Annotated[str, Field(max_length=3)], "NewType": typing.NewType("Age", int),
    "callable discriminator": Annotated[Annotated[Cat, pydantic.Tag("c")] | Annotated[Dog, pydantic.Tag("d")],
                                        pydantic.Discriminator(lambda value: "c")],
}  # fmt: skip

_ADDRESS = {"type": "object", "properties": {"street": {"type": "string"}}, "required": ["street"]}

BY_HAND: dict[str, dict[str, Any]] = {
    **{f"format {name}": {"type": "string", "format": name} for name in (
        "byte", "binary", "password", "phone", "markdown", "int64", "color", "email", "idn-email", "hostname", "idn-hostname",
        "uri", "uri-reference", "uri-template", "iri", "iri-reference", "json-pointer", "relative-json-pointer", "regex",
        "date-time", "date", "time", "duration", "ipv4", "ipv6", "uuid", "path", "multi-host-uri", "ipvanyaddress",
    )},
    "format of a number": {"type": "integer", "format": "int32"},
    "format of a union": {"type": ["integer", "string"], "format": "int64"},
    "OpenAI strict": {"type": "object", "properties": {"city": {"type": "string"}, "unit": {"type": ["string", "null"], "enum": ["C", "F", None]}},
                      "required": ["city", "unit"], "additionalProperties": False},
    "OpenAI steps": {"type": "object", "properties": {"steps": {"type": "array", "items": {"$ref": "#/$defs/step"}}, "final": {"type": "string"}},
                     "$defs": {"step": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"], "additionalProperties": False}},
                     "required": ["steps", "final"], "additionalProperties": False},
    "OpenAI recursive": {"type": "object", "properties": {"type": {"enum": ["div", "p"]}, "children": {"type": "array", "items": {"$ref": "#"}}},
                         "required": ["type", "children"], "additionalProperties": False},
    "OpenAPI nullable": {"type": "object", "properties": {"a": {"type": "string", "nullable": True, "example": "x"}}, "required": ["a"]},
    "definitions": {"definitions": {"a": _ADDRESS}, "type": "object", "properties": {"home": {"$ref": "#/definitions/a"}}},
    "allOf": {"allOf": [_ADDRESS, {"properties": {"zip": {"type": "string"}}, "required": ["zip"]}]},
    "allOf of a reference": {"$defs": {"a": _ADDRESS}, "properties": {"home": {"allOf": [{"$ref": "#/$defs/a"}], "description": "x"}}},
    "anyOf": {"anyOf": [{"type": "integer"}, _ADDRESS, {"type": "null"}]},
    "oneOf apart": {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    "oneOf that overlap": {"oneOf": [{"type": "string", "maxLength": 5}, {"type": "string", "minLength": 3}]},
    "not": {"type": "string", "not": {"enum": ["a", "b"]}},
    "if then else": {"type": "object", "properties": {"kind": {"enum": ["a", "b"]}}, "required": ["kind"],
                     "if": {"properties": {"kind": {"const": "a"}}}, "then": {"properties": {"x": {"type": "integer"}}, "required": ["x"]},
                     "else": {"properties": {"y": {"type": "string"}}}},
    "patternProperties": {"type": "object", "patternProperties": {"^x-": {"type": "string"}}, "additionalProperties": False},
    "patternProperties that look around": {"type": "object", "patternProperties": {"^(?!id)": {"type": "integer"}}, "additionalProperties": False},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,3}$"}, "additionalProperties": {"type": "integer"}},
    "dependentRequired": {"type": "object", "properties": {"card": {"type": "string"}, "name": {"type": "string"}}, "dependentRequired": {"card": ["name"]}},
    "dependentSchemas": {"type": "object", "properties": {"card": {"type": "string"}}, "dependentSchemas": {"card": {"required": ["card"]}}},
    "const": {"const": {"a": [1, None, "x"]}},
    "contains": {"type": "array", "items": {"type": "integer"}, "contains": {"const": 3}, "maxItems": 4},
    "uniqueItems": {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "maxItems": 3},
    "prefixItems": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 2},
    "items of draft 4": {"type": "array", "items": [{"type": "integer"}, {"type": "string"}], "additionalItems": False},
    "minProperties": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2},
    "unevaluatedProperties": {"type": "object", "properties": {"a": {"type": "integer"}}, "unevaluatedProperties": False},
    "multipleOf": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 3},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 9},
    "content": {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"},
    "annotations": {"type": "object", "title": "T", "description": "D", "$comment": "C", "deprecated": True, "readOnly": True, "writeOnly": False,
                    "examples": [{}], "default": {}, "properties": {"a": {"type": "integer", "default": 3, "x-order": 1}}, "required": ["a"]},
    "a dialect": {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://example.com/a.json", "type": "integer"},
    "draft 7": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "properties": {"a": {"type": "integer"}}},
    "no type": {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "nothing": {},
    "an object": {"type": "object"},
    "several types": {"type": ["object", "array", "string", "number", "boolean", "null"]},
    "a pattern of Python": {"type": "string", "pattern": r"\A(?P<year>\d{4})\Z"},
    "a pattern that looks back": {"type": "string", "pattern": r"^(?<!a)b{1,3}$"},
    "a pattern that is none": {"type": "string", "pattern": "[0-9]+("},
    "unicode": {"type": "object", "properties": {"größe": {"enum": ["klein", "groß"]}, "名": {"type": "string", "pattern": "^[ぁ-ん]+$"}}, "required": ["größe", "名"]},
}  # fmt: skip


def schema_of(kind: Any) -> dict[str, Any]:
    """As pydantic writes that of an answer with one value of the type."""
    model = pydantic.create_model("Answer", value=(kind, ...))
    return model.model_json_schema()


def zoo() -> dict[str, dict[str, Any]]:
    """All of them, by name; a type whose schema pydantic cannot write is not among them."""
    found = {}
    for name, kind in OF_PYDANTIC.items():
        try:
            found[name] = schema_of(kind)
        except pydantic.PydanticInvalidForJsonSchema:
            continue
    return {**found, **BY_HAND}
