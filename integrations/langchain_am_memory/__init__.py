"""LangChain and LangGraph on `am_memory`; install it with `attention-matching-memory[langchain]`."""

from langchain_am_memory.chat_models import ChatAMMemory
from langchain_am_memory.checkpoint import AMMemoryCheckpointer
from langchain_am_memory.middleware import AMMemoryMiddleware

__all__ = ["AMMemoryCheckpointer", "AMMemoryMiddleware", "ChatAMMemory"]
