"""LangChain and LangGraph on `am_memory`: installed with `attention-matching-memory[langchain]`."""

__all__: list[str] = []
