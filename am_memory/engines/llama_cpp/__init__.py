"""The engine for GGUF models on stock llama.cpp: `engine.LlamaCppEngine`."""

from am_memory.engines.llama_cpp.engine import LlamaCppEngine

__all__ = ["LlamaCppEngine"]
