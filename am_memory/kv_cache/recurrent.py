"""Layers of a KV cache that grow with no token: recurrent states and short convolutions, and layers without a cache.

Such a state is left alone by compactions. It cannot go back by a token, only to an earlier copy. Knows no other layer.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer, LinearAttentionLayer

from am_memory.errors import UnsupportedOperation
from am_memory.kv_cache.layers import LayerState, RecurrentState


class RecurrentLayer(LinearAttentionLayer):
    """The states of linear attention, of a state-space model or of a short convolution.

    Models write into these tensors. So a state that a snapshot refers to is copied before the model gets it.

    Args:
        number_of_states: pairs of a convolution's state and a recurrent one; 1 for most models.

    Attributes:
        is_shared: a snapshot or another cache refers to the tensors.
    """

    is_sliding = False
    dtype: Any
    device: Any

    def __init__(self, number_of_states: int = 1) -> None:
        super().__init__(number_of_states)
        self.is_shared = False

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be dropped: only if there is none."""
        return not self.tensors

    def own(self) -> None:
        """Copy the tensors if a snapshot refers to them, so that the model may write into them."""
        if self.is_shared:
            for states in (self.conv_states, self.recurrent_states):
                for index, tensor in states.items():
                    states[index] = tensor if tensor is None else tensor.clone()
            self.is_shared = False

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        self.own()
        return super().update_conv_state(conv_states, state_idx, conv_kernel_size, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.own()
        return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def activate_past_recording(self) -> None:
        raise UnsupportedOperation(
            "assisted decoding takes tokens back, and a recurrent state cannot go back: leave out the assistant"
        )

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.tensors:
            raise UnsupportedOperation(
                f"cannot remove {-tokens_to_remove} tokens from a recurrent state; use Session.rewind, which rebuilds"
            )

    def reset(self) -> None:
        nothing = (None,) * self.number_of_states
        self.restore(RecurrentState(nothing, nothing))

    def state(self) -> RecurrentState:
        self.is_shared = True
        return RecurrentState(tuple(self.conv_states.values()), tuple(self.recurrent_states.values()))

    def restore(self, state: LayerState) -> None:
        assert isinstance(state, RecurrentState)
        for index, (conv, recurrent) in enumerate(zip(*state, strict=True)):
            self.conv_states[index], self.recurrent_states[index] = conv, recurrent
            self.is_conv_states_initialized[index] = self.has_previous_state[index] = conv is not None
            self.is_recurrent_states_initialized[index] = recurrent is not None
            self.conv_kernel_size[index] = None if conv is None else conv.shape[-1]
            if conv is not None:
                self.dtype, self.device = conv.dtype, conv.device
        self.is_shared = True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        states = chain(self.conv_states.values(), self.recurrent_states.values())
        return tuple(tensor for tensor in states if tensor is not None)


class EmptyLayer(DummyLayer):
    """A layer without a cache, as those of experts alone."""

    is_sliding = False
    tensors: tuple[Tensor, ...] = ()

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def state(self) -> RecurrentState:
        return RecurrentState((), ())

    def restore(self, state: LayerState) -> None:
        assert isinstance(state, RecurrentState)


class WithRecurrentStates(Cache):
    """A cache whose recurrent states stand apart, so that a layer may have keys and states.

    Attributes:
        recurrent: the layers of recurrent states by the index of the model's layer.
    """

    recurrent: dict[int, RecurrentLayer]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A convolution's state, into which the model may write; None before the first token."""
        layer = self.recurrent[layer_idx]
        layer.own()
        return layer.conv_states[state_idx]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A recurrent state, into which the model may write; None before the first token."""
        layer = self.recurrent[layer_idx]
        layer.own()
        return layer.recurrent_states[state_idx]

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return self.recurrent[layer_idx].update_conv_state(conv_states, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        return self.recurrent[layer_idx].update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether the recurrent states have seen a token; see transformers."""
        layer = self.recurrent[max(self.recurrent) if layer_idx is None else layer_idx]
        return all(layer.has_previous_state.values()) if state_idx is None else layer.has_previous_state[state_idx]
