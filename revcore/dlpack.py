"""Arrays of one framework handed to another where they lie, by DLPack: nothing is copied through the host."""

from __future__ import annotations

import sys
from typing import Any

from revcore.arrays import array_namespace

# What DLPack carries between torch and JAX; narrower ones, of which each has others, go through to_numpy.
_CARRIED = frozenset(
    {"bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64"}
    | {"complex128"}
)
_CPU, _METAL = 1, 8  # DLPack's numbers; Metal has no float64


def on_one_device(a: Any, b: Any) -> tuple[Any, Any, Any] | None:
    """Return ``(namespace, a, b)``, both as arrays of one framework that lie where they lay, by DLPack.

    torch takes a pair of torch and JAX: it always has float64, which JAX halves where x64 is off. Gradients are cut
    off. ``None`` where the two share no device that both can reach: one is NumPy's or a number, or both are JAX's on
    the CPU, whose memory NumPy sees as it is.

    >>> import numpy
    >>> on_one_device(numpy.ones(2), numpy.ones(2)) is None
    True
    """
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    kinds = [_kind(array, torch, jax) for array in (a, b)]
    if None in kinds or not (_has_carried_dtype(a) and _has_carried_dtype(b)):
        return None
    if kinds == ["jax", "jax"]:
        return (array_namespace(a), a, b) if a.devices() == b.devices() and not _is_on_cpu(a) else None
    if torch is None or _place(a) is None or _place(a) != _place(b):
        return None
    a, b = (x.detach() if kind == "torch" else torch.from_dlpack(x) for x, kind in zip((a, b), kinds, strict=True))
    return torch, a, b


def _kind(array: Any, torch: Any, jax: Any) -> str | None:
    """Return whose an array is; ``None`` if it has no values in one place (sparse, on the meta device, traced)."""
    if torch is not None and isinstance(array, torch.Tensor):
        return "torch" if array.layout == torch.strided and not array.is_meta else None
    if jax is not None and isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
        return "jax"
    return None


def is_carried(array: Any, *, cuda: bool) -> bool:
    """Return whether DLPack brings ``array`` into a framework that has the CPU and, with ``cuda``, GPUs.

    >>> import numpy
    >>> is_carried(numpy.ones(2), cuda=False), is_carried(2.0, cuda=False)
    (True, False)
    """
    if not (hasattr(array, "__dlpack__") and _has_carried_dtype(array)):
        return False
    place = _place(array)
    return place is not None and (cuda or place[0] == _CPU)


def _has_carried_dtype(array: Any) -> bool:
    return str(array.dtype).removeprefix("torch.") in _CARRIED


def _place(array: Any) -> tuple[int, int] | None:
    """Return DLPack's kind and number of an array's device; ``None`` if it is spread over several, or out of reach."""
    if hasattr(array, "devices"):  # JAX's, which may be in parts, or in a TPU
        devices = array.devices()
        if len(devices) != 1 or next(iter(devices)).platform not in ("cpu", "gpu"):
            return None
    kind, number = array.__dlpack_device__()
    return (int(kind), int(number)) if kind != _METAL else None


def _is_on_cpu(array: Any) -> bool:
    return all(device.platform == "cpu" for device in array.devices())
