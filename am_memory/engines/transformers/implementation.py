"""Which attention function the parts of a model look up: those of text, and none that only images or audio need.

Some of those parts accept no other function than their own. Knows no cache.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

Setting = dict[str, Any]
"""Names of attention functions, as `set_attn_implementation` takes them: of a configuration under "", of each of its
parts under the part's name."""


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let the text part of a model, and all that it is a part of, look up the attention function of this name."""
    config: PreTrainedConfig = model.config
    model.set_attn_implementation(_for_text(config, config.get_text_config(decoder=True), name) or {"": name})


def _for_text(config: PreTrainedConfig, text: PreTrainedConfig, name: str) -> Setting:
    """The setting for a configuration; empty if the one of text is not in it."""
    if config is text:
        return {"": name}
    parts = {key: _for_text(part, text, name) for key, part in _parts(config).items()}
    found = {key: setting for key, setting in parts.items() if setting}
    return {"": name, **found} if found else {}


def attention_setting(model: PreTrainedModel) -> Setting:
    """What all parts of a model look up now; `model.set_attn_implementation` takes it back."""
    return _setting(model.config)


def _setting(config: PreTrainedConfig) -> Setting:
    return {"": config._attn_implementation, **{key: _setting(part) for key, part in _parts(config).items()}}


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {key: part for key, part in parts.items() if isinstance(part, PreTrainedConfig)}
