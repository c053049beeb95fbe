"""Loads a folder or a hub id with transformers, and refuses a model that is not complete. Knows no GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from am_memory.errors import ModelNotFound, UnsupportedModel

LoadedModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_pretrained(
    source: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> LoadedModel:
    """Load a model and its tokenizer from a hub id or a folder.

    Raises:
        ModelNotFound: the source, a weight or the tokenizer is missing or cannot be read.
        UnsupportedModel: transformers cannot run it as a causal language model.
    """
    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **trust)
        auto_class = _auto_class(config)
        loaded = complete_model(source, auto_class, config=config, dtype=dtype, device_map=device, **trust)
    except (OSError, SafetensorError) as error:
        looked_up = "" if Path(source).is_dir() else " (no such folder here, so it was looked up as a hub id)"
        raise ModelNotFound(f"{source} cannot be loaded{looked_up}: {error}") from error
    except (ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModel(
                f"{source} needs code of its own, which comes with the model: read that code, and if you trust it, "
                "load the model with trust_remote_code=True (--trust-remote-code)"
            ) from error
        raise UnsupportedModel(
            f"{source} is no causal language model that transformers can run: {error}. If you can load it yourself, "
            "pass it on: Memory(TransformersEngine(model, tokenizer))"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **trust)
    except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
        raise ModelNotFound(f"{source} has no tokenizer that transformers can read: {error}") from error
    return loaded, tokenizer


def complete_model(source: str | Path, auto_class: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """Load a model, or raise ModelNotFound if weights are missing; transformers would fill them with random numbers."""
    result: Any = auto_class.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    loaded, report = result
    lacking = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if lacking:
        raise ModelNotFound(
            f"{source} lacks {len(lacking)} of the model's weights, or has them in another size: {lacking[0]}..."
        )
    return cast(PreTrainedModel, loaded)


def _auto_class(config: PreTrainedConfig) -> Any:
    """Choose the class that loads this configuration; a model that also reads images is loaded for its text."""
    own_code = getattr(config, "auto_map", None) or {}
    reads_images = "AutoModelForImageTextToText" in own_code or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    is_text_model = "AutoModelForCausalLM" in own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if reads_images and not is_text_model else AutoModelForCausalLM
