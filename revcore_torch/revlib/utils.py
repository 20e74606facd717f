"""What revlib 1.7.2 has in ``revlib.utils``: networks made of existing ones, and smaller saved tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from revcore.coupling import Additive, Momentum
from revcore.errors import SpecError
from revcore_torch.modules import ReversibleSequential
from revcore_torch.revlib.core import MergeCalls, ReversibleModuleCache, SingleBranchReversibleModule
from revcore_torch.revlib.functions import (
    FUSED_OPTIMIZER,
    MemoryModes,
    additive_coupling_forward,
    additive_coupling_inverse,
    coupling_of,
    get_key,
    split_tensor_list,
)

__all__ = [
    "FUSED_OPTIMIZER",
    "MemoryModes",
    "MergeCalls",
    "MomentumNetSide",
    "MomentumNetStem",
    "ResidualToPlain",
    "ReversibleSequential",
    "SingleBranchReversibleModule",
    "detached_additive_coupling_forward",
    "detached_additive_coupling_inverse",
    "get_key",
    "is_float",
    "maybe_residual_to_plain",
    "memory_efficient_intermediates",
    "module_list_to_momentum_net",
    "momentum_net",
    "optional_detach",
    "residual_to_plain",
    "sequential_to_momentum_net",
    "sequential_to_revnet",
    "split_tensor_list",
]

Couplings = Iterable[Callable[..., Any] | None] | None

# --- blocks -----------------------------------------------------------------------------------------------------------


class MomentumNetSide(nn.Module):
    """``alpha·x``.

    >>> MomentumNetSide(0.5)(torch.ones(1))
    tensor([0.5000])
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return inp if self.alpha == 1 else inp * self.alpha


class MomentumNetStem(nn.Module):
    """``wrapped_module(gamma·x)``.

    >>> MomentumNetStem(nn.Identity(), 0.5)(torch.ones(1))
    tensor([0.5000])
    """

    def __init__(self, wrapped_module: nn.Module, gamma: float = 1.0) -> None:
        super().__init__()
        self.wrapped_module = wrapped_module
        self.gamma = gamma

    def forward(self, inp: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped_module(inp if self.gamma == 1 else inp * self.gamma, *args, **kwargs)


class ResidualToPlain(nn.Module):
    """``wrapped_module(x) − x``: the block inside of a residual layer.

    >>> ResidualToPlain(nn.Identity())(torch.ones(1))
    tensor([0.])
    """

    def __init__(self, wrapped_module: nn.Module) -> None:
        super().__init__()
        self.wrapped_module = wrapped_module

    def forward(self, inp: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.wrapped_module(inp, *args, **kwargs)
        if isinstance(out, Tensor):
            return out - inp
        first, rest = split_tensor_list(out)
        return [first - inp, *rest]


def residual_to_plain(*modules: nn.Module) -> list[ResidualToPlain]:
    """Return each module without its residual connection (:class:`ResidualToPlain`).

    >>> len(residual_to_plain(nn.Identity(), nn.Identity()))
    2
    """
    return [ResidualToPlain(module) for module in modules]


def maybe_residual_to_plain(module: Iterable[nn.Module], residual: bool = False) -> list[nn.Module]:
    """Return the modules, with ``residual`` each without its residual connection.

    >>> maybe_residual_to_plain([nn.Identity()])
    [Identity()]
    """
    return [*residual_to_plain(*module)] if residual else list(module)


def optional_detach(inp: Any) -> Any:
    """Return a tensor detached, and anything else as it is.

    >>> optional_detach(torch.ones(1, requires_grad=True)), optional_detach(1)
    (tensor([1.]), 1)
    """
    return inp.detach() if isinstance(inp, Tensor) else inp


def detached_additive_coupling_forward(other_stream: Tensor, fn_out: Any) -> Any:
    """:func:`additive_coupling_forward`, but that extra outputs are detached.

    >>> detached_additive_coupling_forward(torch.ones(1), [torch.ones(1), torch.ones(1, requires_grad=True)])
    [tensor([2.]), tensor([1.])]
    """
    return _rest_detached(additive_coupling_forward(other_stream, fn_out))


def detached_additive_coupling_inverse(output: Tensor, fn_out: Any) -> Any:
    """:func:`additive_coupling_inverse`, but that extra outputs are detached.

    >>> detached_additive_coupling_inverse(torch.ones(1), [torch.ones(1), torch.ones(1, requires_grad=True)])
    [tensor([0.]), tensor([1.])]
    """
    return _rest_detached(additive_coupling_inverse(output, fn_out))


def _rest_detached(out: Any) -> Any:
    return out if isinstance(out, Tensor) else [out[0], *pytree.tree_map(optional_detach, out[1:])]


# --- networks ---------------------------------------------------------------------------------------------------------


def momentum_net(
    *modules: nn.Module,
    split_dim: int | None = 1,
    coupling_forward: Couplings = None,
    coupling_inverse: Couplings = None,
    memory_mode: MemoryModes = MemoryModes.autograd_function,
    target_device: Any = "",
    fused_optimizer: Any = None,
    beta: float = 0.9,
) -> ReversibleSequential:
    """Return the MomentumNet ``s ← s + f_i(x)``, ``x ← β·x + (1 − β)·s`` over streams ``(s, x)``.

    With ``v = x − x_before``, that is ``v ← β·v + (1 − β)·f_i(x)``, ``x ← x + v`` (Sander et al., arXiv 2102.07870,
    whose ``v = 0`` at first is ``s = x``, so ``split_dim=None``). revlib held ``x/βⁱ`` in the place of ``x``, which
    overflows float32 behind some hundred blocks for ``β = 0.5``, and handed it out: its second half of the output is
    ours divided by ``βⁿ``. Each block is a pair, as revlib had it: ``net[2 * i]`` and ``net[2 * i + 1]``.

    Args:
        *modules: the blocks ``f_i``.
        split_dim: along which the input is parted into ``(s, x)``; ``None`` gives both the whole.
        coupling_forward: revlib's; only additive ones make a MomentumNet.
        coupling_inverse: as well.
        memory_mode: as ``target_device`` and ``fused_optimizer``, :class:`ReversibleSequential`'s.
        beta: strictly between 0 and 1; the way back multiplies an error by ``1/β`` for each block, so for deep ones
            set ``net.policy = Reverse(anchor_every=…)``, as a ``DriftWarning`` will say.

    Raises:
        SpecError: another coupling than an additive one.

    >>> net = momentum_net(*[nn.Linear(4, 4) for _ in range(3)], beta=0.5)
    >>> len(net), net(torch.ones(2, 8)).shape
    (6, torch.Size([2, 8]))
    """
    _check_additive(coupling_forward, coupling_inverse)
    pairs = [block for module in modules for block in (MomentumNetStem(module), MomentumNetSide())]
    return ReversibleSequential(
        *pairs,
        split_dim=split_dim,
        coupling=[Additive(), Momentum(beta)],
        memory_mode=memory_mode,
        target_device=target_device,
        fused_optimizer=fused_optimizer,
    )


def _check_additive(forwards: Couplings, inverses: Couplings) -> None:
    forward, inverse = ([*functions] if functions else [None] for functions in (forwards, inverses))
    x, f = torch.linspace(-1, 1, 7), torch.linspace(2, -3, 7)
    for i in range(max(len(forward), len(inverse))):
        coupling = coupling_of(forward[i % len(forward)], inverse[i % len(inverse)])
        if not torch.allclose(coupling.forward(x, f), x + f):
            raise SpecError(
                "coupling_forward is not x + f, so what it makes is no MomentumNet: write "
                "ReversibleSequential(*modules, coupling_forward=…, coupling_inverse=…)"
            )


def sequential_to_revnet(
    module: Iterable[nn.Module],
    split_dim: int | None = 1,
    coupling_forward: Any = None,
    coupling_inverse: Any = None,
    memory_mode: MemoryModes = MemoryModes.autograd_function,
    target_device: Any = "",
    fused_optimizer: Any = None,
    residual: bool = False,
) -> ReversibleSequential:
    """Return a :class:`ReversibleSequential` of the modules of ``module``.

    Args:
        module: an ``nn.Sequential``.
        residual: whether they are residual layers, whose ``x`` is taken away again (:class:`ResidualToPlain`).

    Other arguments and errors are :class:`ReversibleSequential`'s.

    >>> sequential_to_revnet(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))(torch.ones(2, 8)).shape
    torch.Size([2, 8])
    """
    return ReversibleSequential(
        *maybe_residual_to_plain(module, residual),
        split_dim=split_dim,
        coupling_forward=coupling_forward,
        coupling_inverse=coupling_inverse,
        memory_mode=memory_mode,
        target_device=target_device,
        fused_optimizer=fused_optimizer,
    )


def sequential_to_momentum_net(
    module: Iterable[nn.Module],
    split_dim: int | None = 1,
    coupling_forward: Couplings = None,
    coupling_inverse: Couplings = None,
    memory_mode: MemoryModes = MemoryModes.autograd_function,
    target_device: Any = "",
    fused_optimizer: Any = None,
    residual: bool = False,
    beta: float = 0.9,
) -> ReversibleSequential:
    """Return a :func:`momentum_net` of the modules of ``module``; ``residual`` as for :func:`sequential_to_revnet`.

    >>> len(sequential_to_momentum_net(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), beta=0.5))
    4
    """
    return momentum_net(
        *maybe_residual_to_plain(module, residual),
        split_dim=split_dim,
        coupling_forward=coupling_forward,
        coupling_inverse=coupling_inverse,
        memory_mode=memory_mode,
        target_device=target_device,
        fused_optimizer=fused_optimizer,
        beta=beta,
    )


def module_list_to_momentum_net(
    module: Iterable[nn.Module],
    split_dim: int | None = 1,
    coupling_forward: Couplings = None,
    coupling_inverse: Couplings = None,
    memory_mode: MemoryModes = MemoryModes.autograd_function,
    target_device: Any = "",
    fused_optimizer: Any = None,
    residual: bool = False,
    beta: float = 0.9,
) -> nn.ModuleList:
    """Return a MomentumNet to put in the place of a list of layers that a model calls one after the other.

    ``s ← s + f_i(x)``, ``x ← β·x + (1 − β)·s``, as :func:`momentum_net`; both streams begin as the first input, module
    ``i`` returns ``x`` and the last one ``s``. With ``residual`` and a small ``β`` that is nearly the network it was
    made of. What a layer returns beside its first output is returned too.

    revlib's ``s`` began at 0, which loses most of the input whatever ``β`` is; weights that were trained so want
    ``modules[0].wrapped_modules[0].start = "zeros"`` (``modules[0].start`` in a list of one).

    Args:
        module: an ``nn.ModuleList``, of at least one layer.
        split_dim: not used: every layer sees the whole stream.
        residual: whether they are residual layers.
        beta: strictly between 0 and 1.

    Other arguments and errors are :func:`momentum_net`'s.

    >>> layers = module_list_to_momentum_net(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), beta=0.5)
    >>> x = torch.ones(2, 4)
    >>> for layer in layers:
    ...     x = layer(x)
    >>> x.sum().backward()
    """
    layers = maybe_residual_to_plain(module, residual)
    if not layers:
        raise SpecError("the list of modules came empty, expected at least one")
    _check_additive(coupling_forward, coupling_inverse)
    mode = MemoryModes(memory_mode)
    waiting: list[Any] = []

    def one(block: nn.Module, coupling: Any = None, **place: Any) -> SingleBranchReversibleModule:
        return SingleBranchReversibleModule(
            waiting,
            block,
            coupling,
            memory_savings=mode != MemoryModes.no_savings,
            cache=ReversibleModuleCache() if mode == MemoryModes.checkpoint else None,
            target_device=target_device,
            fused_optimizer=fused_optimizer,
            start="input",
            **place,
        )

    result = nn.ModuleList()
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        stem = one(MomentumNetStem(layer), first=i == 0, last=last)
        side = one(MomentumNetSide(), Momentum(beta))
        result.append(stem if last else MergeCalls(stem, side, collate_fn=_first_and_extra))
    return result


def _first_and_extra(output: Tensor, outputs: list[Any]) -> list[Any]:
    return [output, *outputs[0][1:]]


# --- smaller saved tensors --------------------------------------------------------------------------------------------


def is_float(inp: Tensor) -> bool:
    """Whether a tensor is of one of the usual floating-point dtypes.

    >>> is_float(torch.ones(1)), is_float(torch.ones(1, dtype=torch.int64))
    (True, False)
    """
    return inp.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def memory_efficient_intermediates(
    storage_dtype: torch.dtype | None = None,
    storage_device: Any = None,
    tensor_filter: Callable[[Tensor], bool] = is_float,
) -> saved_tensors_hooks:
    """Return a context in which autograd saves tensors in another dtype, or on another device; it changes no output.

    A gradient made of rounded tensors is rounded, too. A reversible network inside the context starts its way back from
    rounded outputs, and saves nothing that could be smaller: leave it out.

    Args:
        storage_dtype: ``None`` leaves tensors in theirs.
        storage_device: ``None`` leaves tensors where they are.
        tensor_filter: which tensors. Parameters and other leaves are there anyway, and stay as they are.

    >>> x = torch.ones(2, requires_grad=True)
    >>> with memory_efficient_intermediates(torch.half):
    ...     y = (x.exp() * 2).sum()
    >>> y.backward(); x.grad
    tensor([5.4375, 5.4375])
    """

    def pack(tensor: Tensor) -> tuple[torch.dtype, torch.device, Tensor, int]:
        kept = tensor
        if tensor_filter(tensor) and not (tensor.is_leaf and tensor.requires_grad):
            kept = tensor.to(device=storage_device, dtype=storage_dtype)
        return tensor.dtype, tensor.device, kept, kept._version

    def unpack(saved: tuple[torch.dtype, torch.device, Tensor, int]) -> Tensor:
        dtype, device, kept, version = saved
        if kept._version != version:
            raise RuntimeError("a tensor that a gradient needs was changed in place after it was saved")
        return kept.to(device=device, dtype=dtype)

    return saved_tensors_hooks(pack, unpack)
