"""The little that the specification needs to know of arrays, whoever made them."""

from __future__ import annotations

import sys
from typing import Any


def array_namespace(array: Any) -> Any:
    """Return the module whose functions work on ``array``: numpy, torch or jax.numpy.

    NumPy and JAX arrays tell it themselves (``__array_namespace__`` of the array-API standard);
    torch tensors do not yet, and torch is certainly loaded when one of its tensors is at hand.

    Raises:
        TypeError: ``array`` belongs to no known library.

    >>> import numpy
    >>> array_namespace(numpy.ones(2)) is numpy
    True
    """
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    for cls in type(array).__mro__:
        if cls.__module__.partition(".")[0] == "torch":
            return sys.modules["torch"]
    raise TypeError(f"expected a NumPy array, torch tensor or JAX array, got {type(array).__name__}")


def permute_axes(array: Any, axes: tuple[int, ...]) -> Any:
    """Return ``array`` with its axes in the order ``axes`` (``permute_dims`` of the array-API standard).

    >>> import numpy
    >>> permute_axes(numpy.ones((2, 3, 4)), (2, 0, 1)).shape
    (4, 2, 3)
    """
    namespace = array_namespace(array)
    permute = getattr(namespace, "permute_dims", None) or namespace.permute
    return permute(array, axes)
