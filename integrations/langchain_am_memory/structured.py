"""Answers in the form of a schema: a model that is bound to it, and what parses what it says."""

from __future__ import annotations

from typing import Any, Literal, cast

from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

Method = Literal["function_calling", "json_schema", "json_mode"]


def structured(
    chat: BaseChatModel, schema: dict[str, Any] | type, method: Method, *, include_raw: bool
) -> Runnable[LanguageModelInput, Any]:
    """The model with its answers in that form; `ChatAMMemory.with_structured_output` says more."""
    is_pydantic = isinstance(schema, type) and is_basemodel_subclass(schema)
    tool = convert_to_openai_tool(schema)
    format_of = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": tool}}
    model: Runnable[LanguageModelInput, Any]
    parser: Any
    if method == "function_calling":
        name = tool["function"]["name"]
        model = chat.bind_tools([tool], tool_choice=name, **format_of)
        parser = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)  # type: ignore[list-item]
            if is_pydantic
            else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        )
    else:
        named = {"name": tool["function"]["name"], "schema": convert_to_json_schema(schema)}
        wanted = {"type": "json_schema", "json_schema": named}
        model = chat.bind(response_format=wanted, **format_of)
        parser = PydanticOutputParser(pydantic_object=cast(type, schema)) if is_pydantic else JsonOutputParser()
    if not include_raw:
        return cast("Runnable[LanguageModelInput, Any]", model | parser)
    parsed = RunnablePassthrough.assign(
        parsed=RunnableLambda(lambda output: output["raw"]) | parser, parsing_error=lambda _: None
    )
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return {"raw": model} | parsed.with_fallbacks([failed], exception_key="parsing_error")
