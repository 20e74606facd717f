"""revlib's types, couplings and small functions."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from revcore import sequential
from revcore.coupling import Coupling
from revcore.policy import Checkpoint, Reverse, StepPolicy, StoreAll

TENSOR_OR_LIST = list[Tensor] | Tensor
QUAD_TENSOR = tuple[Tensor, Tensor, Tensor, Tensor]
DUAL_OR_QUAD_TENSOR = QUAD_TENSOR | tuple[Tensor, Tensor]
COUPLING = Callable[[Tensor, TENSOR_OR_LIST], TENSOR_OR_LIST]
FUSED_OPTIMIZER = Callable[[Iterable[Any]], torch.optim.Optimizer] | None


class MemoryModes(enum.IntEnum):
    """revlib's policies: ``StoreAll()``, ``Checkpoint()``, and twice ``Reverse()``.

    >>> MemoryModes.autograd_function.policy
    Reverse(anchor_every=None, keep_last=0, recompute=None, offload=False)
    """

    no_savings = 0
    checkpoint = 1
    autograd_graph = 2
    autograd_function = 3

    @property
    def policy(self) -> StepPolicy:
        """The policy of today."""
        return (StoreAll(), Checkpoint(), Reverse(), Reverse())[self]


# --- couplings --------------------------------------------------------------------------------------------------------


def split_tensor_list(inp: Any) -> Any:
    """Return a tensor as it is, and a sequence of them as ``(first, the rest as a list)``.

    Raises:
        ValueError: neither came.

    >>> split_tensor_list([1, 2, 3])
    (1, [2, 3])
    """
    if isinstance(inp, Tensor):
        return inp
    if not isinstance(inp, Iterable):
        raise ValueError(f"came as {type(inp).__name__}, expected a tensor or a sequence of tensors")
    first, *rest = inp
    return first, rest


def take_0th_tensor(inp: Any) -> Tensor:
    """Return a tensor as it is, and the first of a sequence of them.

    >>> take_0th_tensor([torch.ones(1), torch.zeros(1)])
    tensor([1.])
    """
    return inp if isinstance(inp, Tensor) else split_tensor_list(inp)[0]


def additive_coupling_forward(other_stream: Tensor, fn_out: Any) -> Any:
    """``y = x + f``; of a list ``[f, *extra]``, ``[x + f, *extra]``.

    >>> additive_coupling_forward(torch.ones(()), torch.ones(()))
    tensor(2.)
    """
    return on_first(fn_out, lambda f: other_stream + f)


def additive_coupling_inverse(output: Tensor, fn_out: Any) -> Any:
    """``x = y − f``; of a list ``[f, *extra]``, ``[y − f, *extra]``.

    >>> additive_coupling_inverse(torch.ones(()), torch.ones(()))
    tensor(0.)
    """
    return on_first(fn_out, lambda f: output - f)


momentum_coupling_inverse = additive_coupling_inverse
"""1.0.1's name for it: its default, and no inverse of a momentum coupling."""


def on_first(fn_out: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(fn_out, Tensor):
        return function(fn_out)
    first, rest = split_tensor_list(fn_out)
    return [function(first), *rest]


def coupling_of(forward: Any, inverse: Any) -> Coupling:
    """Return the coupling of two of revlib's functions, or two ``None``, proved on random values."""
    if isinstance(forward, Coupling) and inverse is None:
        return forward
    additive = (None, additive_coupling_forward), (None, additive_coupling_inverse)
    if forward in additive[0] and inverse in additive[1]:
        forward = inverse = None
    return sequential.check_settings(None, None, [forward], [inverse], 2, torch.from_numpy)[0]


# --- tensors ----------------------------------------------------------------------------------------------------------


class TensorOffload(torch.autograd.Function):
    """``inp`` on the device of ``reference``; its gradient comes back to where ``inp`` is.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> TensorOffload.apply(weight, torch.zeros(()))
    tensor([1., 1.], grad_fn=<TensorOffloadBackward>)
    """

    @staticmethod
    def forward(ctx: Any, inp: Tensor, reference: Tensor) -> Tensor:
        ctx.device = inp.device
        return inp.to(reference.device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].to(ctx.device), None


def offload_tensor(inp: Tensor, reference: Tensor) -> Tensor:
    """Return ``TensorOffload.apply(inp, reference)``.

    >>> offload_tensor(torch.ones(2), torch.zeros(()))
    tensor([1., 1.])
    """
    return TensorOffload.apply(inp, reference)  # type: ignore[return-value]


def get_key(idx: int, inp: Tensor) -> str:
    """Return the text by which revlib told saved tensors apart.

    >>> get_key(0, torch.ones(2)).splitlines()[:2]
    ['Index: 0', 'Size: torch.Size([2])']
    """
    return f"Index: {idx}\nSize: {inp.size()}\nDevice: {inp.device}\nDataType: {inp.dtype}"
