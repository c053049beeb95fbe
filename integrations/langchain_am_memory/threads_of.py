"""Which thread a call belongs to: LangChain has it in another place for every way of calling a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.runnables import RunnableConfig, ensure_config

NAMES = ("thread_id", "session_id")
DEFAULT = "default"


def lifted(config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments, with the thread of a config that a bare model's own methods do not pass on."""
    found = _find((config or {}).get("configurable")) if "thread_id" not in kwargs else None
    return kwargs if found is None else {**kwargs, "thread_id": found}


def of_call(kwargs: dict[str, Any], run_manager: Any) -> str:
    """The thread of a call: bound or lifted, of the running graph's config, or of the callbacks' metadata.

    Takes `thread_id` out of `kwargs`.
    """
    bound = kwargs.pop("thread_id", None)
    if bound is not None:
        return str(bound)
    found = _find(ensure_config().get("configurable")) or _find(getattr(run_manager, "metadata", None))
    return found or DEFAULT


def of_config(config: RunnableConfig) -> str:
    """The thread that a config names."""
    return _find(config.get("configurable")) or DEFAULT


def _find(values: Mapping[str, Any] | None) -> str | None:
    return next((str(values[name]) for name in NAMES if values and values.get(name) is not None), None)
