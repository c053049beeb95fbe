"""Answers that follow a schema: the model bound to it, and the parsers of its answers."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal, cast

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import (
    BaseCumulativeTransformOutputParser,
    JsonOutputParser,
    PydanticOutputParser,
)
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import Generation
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import ConfigDict

from am_memory.text.json_schemas import SchemaCheck, Unchecked

logger = logging.getLogger("am_memory.langchain")

Method = Literal["function_calling", "json_schema", "json_mode"]


class _Checked(BaseCumulativeTransformOutputParser[Any]):
    """Checks a complete value against its schema, as pydantic does for its own classes."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    check: SchemaCheck

    def _require(self, value: Any) -> None:
        try:
            problem = None if value is None else self.check.problem_with(value)
        except Unchecked as error:
            logger.warning("the answer is not checked: %s", error)
            return
        if problem is not None:
            raise OutputParserException(f"the answer does not follow its schema: {problem}", json.dumps(value))

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        value = super().parse_result(result, partial=partial)
        if not partial:
            self._require(value)
        return value

    def _transform(self, input: Iterator[str | BaseMessage]) -> Iterator[Any]:
        value = None
        for value in super()._transform(input):
            yield value
        self._require(value)

    async def _atransform(self, input: AsyncIterator[str | BaseMessage]) -> AsyncIterator[Any]:
        value = None
        async for value in super()._atransform(input):
            yield value
        self._require(value)


class _Complete(JsonOutputParser):
    """Refuses JSON that was cut off. LangChain's own parser completes it, even at the end of the answer."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        if not partial:
            try:
                json.loads(result[0].text)
            except ValueError as error:
                raise OutputParserException(f"the answer was cut off: {error}", result[0].text) from error
        return super().parse_result(result, partial=partial)


class CheckedJson(_Checked, _Complete):
    """Parses an answer that is JSON."""


class CompleteObject(_Complete, PydanticOutputParser[Any]):
    """Parses an answer that is the JSON of a pydantic object."""


class CheckedCall(_Checked, JsonOutputKeyToolsParser):
    """Parses the arguments of a call."""


def structured(
    chat: BaseChatModel, schema: dict[str, Any] | type, method: Method, *, include_raw: bool
) -> Runnable[LanguageModelInput, Any]:
    """The model bound to a schema, with a parser; see `ChatAMMemory.with_structured_output`."""
    is_pydantic = isinstance(schema, type) and is_basemodel_subclass(schema)
    tool = convert_to_openai_tool(schema)
    json_schema = convert_to_json_schema(schema)
    langsmith_format = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": tool}}
    model: Runnable[LanguageModelInput, Any]
    parser: Any
    if method == "function_calling":
        name = tool["function"]["name"]
        model = chat.bind_tools([tool], tool_choice=name, **langsmith_format)
        parser = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)  # type: ignore[list-item]
            if is_pydantic
            else CheckedCall(key_name=name, first_tool_only=True, check=SchemaCheck(json_schema))
        )
    else:
        named = {"name": tool["function"]["name"], "schema": json_schema}
        model = chat.bind(response_format={"type": "json_schema", "json_schema": named}, **langsmith_format)
        parser = (
            CompleteObject(pydantic_object=cast(type, schema))
            if is_pydantic
            else CheckedJson(check=SchemaCheck(json_schema))
        )
    if not include_raw:
        return cast("Runnable[LanguageModelInput, Any]", model | parser)
    parsed = RunnablePassthrough.assign(
        parsed=RunnableLambda(lambda output: output["raw"]) | parser, parsing_error=lambda _: None
    )
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return {"raw": model} | parsed.with_fallbacks([failed], exception_key="parsing_error")
