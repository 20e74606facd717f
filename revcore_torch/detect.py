"""Finding what defeats saved-tensor hooks: a custom ``Function`` that keeps tensors on ``ctx`` by itself.

Such tensors are invisible to any hook, ours and activation checkpointing's: they stay alive in every layer, and memory
grows with depth although nothing is wrong in value.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

_inspected: weakref.WeakSet[Any] = weakref.WeakSet()


def hidden_tensors(output: Any, first_node: int = 0) -> list[str]:
    """Return ``"Function.attribute"`` for each tensor that the graph of ``output`` keeps on a ``ctx``.

    Args:
        output: a tensor, or a tree of them.
        first_node: the sequence number (``torch.autograd._get_sequence_nr()``) from which on nodes are looked at.

    >>> import torch
    >>> class Square(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         ctx.x = x  # should be ctx.save_for_backward(x)
    ...         return x * x
    ...     @staticmethod
    ...     def backward(ctx, g):
    ...         return 2 * ctx.x * g
    >>> hidden_tensors(Square.apply(torch.ones(2, requires_grad=True)))
    ['Square.x']
    """
    found: dict[str, None] = {}
    for node in nodes_of(output, first_node):
        for name, value in getattr(node, "__dict__", {}).items():
            if any(_is_inexact(leaf) for leaf in pytree.tree_leaves(value)):
                found[f"{type(node).__name__.removesuffix('Backward')}.{name}"] = None
    return list(found)


def warn_once(index: int, block: Any, output: Any, first_node: int) -> None:
    """T11: look through a block's graph at its first run, and say so if it keeps tensors out of sight."""
    if block is None or block in _inspected:
        return
    with contextlib.suppress(TypeError):  # a block that cannot be remembered is looked at each time
        _inspected.add(block)
    names = hidden_tensors(output, first_node)
    if names:
        warnings.warn(
            f"block of step {index} keeps tensors on ctx ({', '.join(names)}), where no hook can see them: they stay "
            "in memory for every layer. Use ctx.save_for_backward(...) in that Function",
            stacklevel=2,
        )


def nodes_of(output: Any, first_node: int = 0) -> Iterator[Any]:
    """Yield the nodes of the graph of ``output``, a tensor or a tree of them, from number ``first_node`` on."""
    seen: set[Any] = set()
    stack = [t.grad_fn for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    while stack:
        node = stack.pop()
        if node is None or node in seen or node._sequence_nr() < first_node:
            continue
        seen.add(node)
        yield node
        stack += [following for following, _ in node.next_functions]


def _is_inexact(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
