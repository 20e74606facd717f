"""A layer that an engine has parted, run a second time: in hooks of the layer FSDP2 and ZeRO-3 gather its parameters.

The model's own loop calls the layer, and so its hooks, in the first run alone. Most often an engine has gathered the
layer for its backward pass by then; but under ``Checkpoint`` all layers of a segment run again in the last one's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_ENGINES = ("deepspeed.", "torch.distributed.fsdp.")


@contextlib.contextmanager
def gathered(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
    """Have the parameters of ``layer`` whole meanwhile; give what is yielded the layer's output.

    Engines' hooks are called for what they do; what they return, casts and identities, is in the first run's graph.

    >>> with gathered(nn.Linear(2, 2), (), {}) as done:
    ...     done(None)
    """
    if not _is_parted(layer):
        yield lambda _: None
        return
    before, after = layer._forward_pre_hooks, layer._forward_hooks
    for key in [key for key, hook in before.items() if _is_engines(hook)]:
        before[key](layer, args, *([kwargs] if key in layer._forward_pre_hooks_with_kwargs else ()))

    def done(output: Any) -> None:
        for key in [key for key, hook in after.items() if _is_engines(hook)]:
            after[key](layer, args, *([kwargs] if key in layer._forward_hooks_with_kwargs else ()), output)

    yield done


def _is_engines(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_ENGINES)


def _is_parted(layer: nn.Module) -> bool:
    """Return whether a parameter that the layer's own hooks gather is not whole: a ``DTensor``, or emptied by ZeRO-3.

    ZeRO-3 gathers those of modules inside in hooks of theirs, but for a layer that it was told to take as one.
    """
    own: Iterator[Any] = layer.parameters(recurse=getattr(layer, "_z3_leaf", False))
    return any(p.numel() != getattr(p, "ds_numel", p.numel()) for p in own) or any(
        hasattr(p, "device_mesh") for p in layer.parameters()
    )
