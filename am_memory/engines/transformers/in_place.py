"""Methods of a model that are replaced on one object."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any


class InPlaceOf:
    """Replaces a method of a model. A deep copy of the model gets the original method.

    Args:
        method: the model's method, or an earlier replacement.
        instead: is called in its place.
    """

    def __init__(self, method: Callable[..., Any], instead: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method, updated=())  # not its attributes: it may be of this class
        self._method, self._instead = method, instead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._instead(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._method, memo)
