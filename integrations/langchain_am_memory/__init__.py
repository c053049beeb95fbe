"""LangChain and LangGraph on `am_memory`; install it with `attention-matching-memory[langchain]`."""

from am_memory.errors import how_to_install

try:
    from langchain_am_memory.chat_models import ChatAMMemory
    from langchain_am_memory.checkpoint import AMMemoryCheckpointer
    from langchain_am_memory.middleware import AMMemoryMiddleware
    from langchain_am_memory.provider import register_provider
except ModuleNotFoundError as error:
    if error.name is None or not error.name.startswith("lang"):
        raise
    needed = f"langchain_am_memory needs {error.name}: {how_to_install('langchain')}"
    raise ModuleNotFoundError(needed, name=error.name) from error

__all__ = ["AMMemoryCheckpointer", "AMMemoryMiddleware", "ChatAMMemory", "register_provider"]
