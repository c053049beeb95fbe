"""The engine for transformers models: `engine.TransformersEngine`."""

from am_memory.engines.transformers.engine import TransformersEngine

__all__ = ["TransformersEngine"]
