"""The little that the specification needs to know of arrays, whoever made them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
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


def arange(start: int, stop: int, like: Any) -> Any:
    """Return ``start, …, stop − 1`` with the dtype of ``like``, and on its device.

    >>> import numpy
    >>> arange(1, 4, numpy.ones(1, numpy.int32))
    array([1, 2, 3], dtype=int32)
    """
    namespace = array_namespace(like)
    device = {"device": like.device} if namespace.__name__ == "torch" else {}
    return namespace.arange(start, stop, dtype=like.dtype, **device)


def as_type(array: Any, dtype: Any) -> Any:
    """Return ``array`` with its numbers converted to ``dtype``, which is of the array's own library.

    >>> import numpy
    >>> as_type(numpy.ones(2), numpy.int32)
    array([1, 1], dtype=int32)
    """
    return array.astype(dtype) if hasattr(array, "astype") else array.to(dtype)


def divided(integers: Any, by: int) -> tuple[Any, Any]:
    """Return quotient and remainder of integers that are not negative.

    >>> import numpy
    >>> divided(numpy.array([7]), 2)
    (array([3]), array([1]))
    """
    if array_namespace(integers).__name__.startswith("jax"):  # whose // has much to say of signs
        lax = sys.modules["jax"].lax
        quotient = lax.div(integers, lax.full_like(integers, by))
    else:
        quotient = integers // by
    return quotient, integers - quotient * by


def widened(f: Any, stream: Any) -> Any:
    """Return a block's output, or its parts, in the stream's dtype where it is narrower.

    >>> import numpy
    >>> widened((numpy.ones(1, "f2"), numpy.ones(1, "f8")), numpy.ones(1, "f4"))
    (array([1.], dtype=float32), array([1.]))
    """
    if isinstance(f, tuple):
        return tuple(widened(part, stream) for part in f)
    return as_type(f, stream.dtype) if f.dtype.itemsize < stream.dtype.itemsize else f


def constant(array: Any) -> Any:
    """Return the values of ``array``, through which no derivative flows.

    NumPy has none but the complex step's, in the imaginary part (see ``revcore.reference``).

    >>> import numpy
    >>> constant(numpy.array([1 + 1e-20j]))
    array([1.])
    """
    namespace = array_namespace(array).__name__
    if namespace == "torch":
        return array.detach()
    if namespace == "numpy":
        return array.real
    return sys.modules["jax"].lax.stop_gradient(array)


def straight(values: Any, surrogate: Callable[[], Any]) -> Any:
    """Return ``values`` to the bit, with the derivative of ``surrogate()`` ("straight through").

    Bengio, Léonard and Courville, arXiv 1308.3432. ``surrogate`` is called where somebody could ask for a derivative.

    >>> import numpy
    >>> straight(numpy.array([2.0]), lambda: numpy.array([1.9 + 1e-20j])).imag / 1e-20
    array([1.])
    """
    namespace = array_namespace(values).__name__
    if namespace == "torch" and not sys.modules["torch"].is_grad_enabled():
        return values
    near = surrogate()
    if namespace == "numpy":
        return values + 1j * near.imag if near.dtype.kind == "c" else values
    if namespace == "torch":
        # a difference of a number and itself is 0, and its derivative that of the first
        return values + (near - constant(near))
    return importlib.import_module("revcore_jax.straight").straight(values, near)
