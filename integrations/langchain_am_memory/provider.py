"""`init_chat_model("am_memory:MODEL")`: LangChain makes a `ChatAMMemory` by its provider's name."""

from __future__ import annotations

from typing import Any

from langchain.chat_models import base

from am_memory.errors import UnsupportedOperation
from langchain_am_memory.chat_models import ChatAMMemory

PROVIDER = "am_memory"


def register_provider() -> None:
    """Add `am_memory` to the providers of LangChain's `init_chat_model`; call it once.

    Then `init_chat_model("am_memory:demo", trigger=2048)` is `ChatAMMemory(model="demo", trigger=2048)`. LangChain has
    no public call for this: its table of providers is changed.

    Raises:
        UnsupportedOperation: this version of LangChain has no such table.
    """
    providers = getattr(base, "_BUILTIN_PROVIDERS", None)
    if not isinstance(providers, dict):
        raise UnsupportedOperation(
            "this version of LangChain keeps its providers elsewhere: make ChatAMMemory(model=...) directly"
        )
    providers[PROVIDER] = ("langchain_am_memory", "ChatAMMemory", _new)


def _new(cls: type[ChatAMMemory], **settings: Any) -> ChatAMMemory:
    return cls(**settings)
