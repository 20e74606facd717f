"""Key-value caches: a block that runs twice would write into one twice."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import Cache
from transformers.utils import logging

from revcore.errors import SpecError

_logger = logging.get_logger(__name__)


def holds_any(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a layer is given a cache."""
    return any(isinstance(value, Cache) for value in (*args, *kwargs.values()))


def without(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return a layer's arguments without the cache, which is of no use in training.

    Raises:
        SpecError: the cache holds something, which the layer would then not see.
    """
    args = [_none_for(value) for value in args]
    kwargs = {name: _none_for(value) for name, value in kwargs.items()}
    if kwargs.get("use_cache"):
        kwargs["use_cache"] = False
    return args, kwargs


def warn_of_storing() -> None:
    """Say that a call with a cache is not rebuilt."""
    warnings.warn(
        "a reversible model in eval mode got a cache while gradients are recorded, so this call keeps all activations, "
        "as the ordinary model does: write torch.no_grad() if no gradient is wanted, use_cache=False (or "
        "model.train()) if one is",
        stacklevel=2,
    )


def _none_for(value: Any) -> Any:
    if not isinstance(value, Cache):
        return value
    length = int(value.get_seq_length())
    if length:
        raise SpecError(
            f"a cache with {length} tokens came to a reversible layer in training, which runs twice and would write "
            "into it twice: call the model under torch.no_grad(), or give it policy=StoreAll(), which keeps everything"
        )
    _logger.warning_once("`use_cache=True` is of no use in training: reversible layers run without a cache.")
    return None
