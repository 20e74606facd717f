"""How the backward pass gets its activations: stored, checkpointed, by four other libraries, and by this one.

A way makes a function of the joined streams out of blocks. All ways get the very same blocks, so nothing but the way
differs.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from benchmarks.torch_engine.workloads import Blocks
from revcore_torch import Checkpoint, MemoryBudget, Reverse, ReversibleSequential, StoreAll

Net = Callable[[Tensor], Tensor]
Run = Callable[..., Any]
Family = Literal["stored", "checkpoint", "peer", "revcore"]


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        name: what a row is called.
        family: whose it is.
        build: blocks and the dimension of the streams → the network.
        streams: how many streams it has; with one, it is the residual network ``x + f(x)`` of the same blocks.
        frontier: one of many policies, for the picture of time against memory alone.
    """

    name: str
    family: Family
    build: Callable[[Blocks, int], Net]
    streams: int = 2
    frontier: bool = False


STORE_ALL = "store-all"
PLAIN = {2: "two streams by hand", 1: "one stream by hand"}
CHECKPOINT_PAIR = "checkpoint, pair"
CHECKPOINT_BLOCK = "checkpoint, block"
REVLIB = "revlib"
REVERSE = "Reverse()"

aten = torch.ops.aten
ATTENTION = [
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
]
MATMULS = [*ATTENTION, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default]


def ways(depth: int) -> list[Way]:
    """Return all ways for networks of ``depth`` blocks, store-all first."""
    some = sorted({depth // 8, depth // 4, depth // 2, 3 * depth // 4} - {0})
    every = [n for n in (4, 8) if n < depth]
    shares = (0.2, 0.3, 0.5) if depth >= 16 else ()  # shares of a shallow network are less than it needs
    selections = {"matmuls": MATMULS, "attention": ATTENTION}
    return [
        _ours(STORE_ALL, StoreAll(), family="stored"),
        Way(PLAIN[2], "stored", _by_hand(_call)),
        Way(PLAIN[1], "stored", _by_hand(_call, streams=1), streams=1),
        Way(CHECKPOINT_BLOCK, "checkpoint", _by_hand(_checkpoint)),
        Way(CHECKPOINT_PAIR, "checkpoint", _by_hand(_checkpoint, every=2)),
        Way("checkpoint, one stream", "checkpoint", _by_hand(_checkpoint, streams=1), streams=1),
        *(Way(f"checkpoint, {n} blocks", "checkpoint", _by_hand(_checkpoint, every=n), frontier=True) for n in every),
        *(
            Way(f"checkpoint, last {n} stored", "checkpoint", _by_hand(_checkpoint, keep_last=n), frontier=True)
            for n in some
        ),
        *(
            Way(f"checkpoint, keeps {name}", "checkpoint", _by_hand(_selective(kept)), frontier=True)
            for name, kept in selections.items()
        ),
        Way(REVLIB, "peer", _revlib),
        Way("memcnn", "peer", _memcnn),
        Way("revtorch", "peer", _revtorch),
        Way("reformer-pytorch", "peer", _reformer),
        _ours(REVERSE, Reverse()),
        *(_ours(f"Reverse(keep_last={n})", Reverse(keep_last=n), frontier=True) for n in some),
        *(_ours(f"Reverse(anchor_every={n})", Reverse(anchor_every=n), frontier=True) for n in every),
        *(
            _ours(f"Reverse(recompute={name})", Reverse(recompute=kept), frontier=True)
            for name, kept in selections.items()
        ),
        *(_ours(f"Checkpoint({n})", Checkpoint(every=n), frontier=True) for n in (1, 2, *every)),
        *(
            _ours(f"Checkpoint(), last {n} stored", [Checkpoint()] * (depth - n) + [StoreAll()] * n, frontier=True)
            for n in some
        ),
        *(_ours(f"MemoryBudget({share})", MemoryBudget(fraction=share), frontier=True) for share in shares),
    ]


def _ours(name: str, policy: Any, family: Family = "revcore", frontier: bool = False) -> Way:
    return Way(
        name,
        family,
        lambda blocks, dim: ReversibleSequential(*blocks, split_dim=dim, policy=policy),
        frontier=frontier,
    )


# --- by hand, with and without torch.utils.checkpoint ---------------------------------------------------------------


def _by_hand(run: Run, every: int | None = None, keep_last: int = 0, streams: int = 2) -> Any:
    """A network written out: ``run`` calls each block, or each ``every`` blocks with their couplings."""

    def build(blocks: Blocks, dim: int) -> Net:
        cut = len(blocks) - keep_last

        def part(some: Blocks, *given: Tensor, call: Run = _call) -> tuple[Tensor, ...]:
            x, *other = given
            for block in some:
                if other:  # a half-step: the stream it changed comes last next time
                    x, other = other[0], [x + call(block, other[0])]
                else:
                    x = x + call(block, x)
            return x, *other

        def net(x: Tensor) -> Tensor:
            parted: tuple[Tensor, ...] = (x,) if streams == 1 else x.chunk(2, dim)
            if every is None:
                parted = part(blocks[:cut], *parted, call=run)
            else:
                for i in range(0, cut, every):
                    parted = run(part, blocks[i : min(i + every, cut)], *parted)
            parted = part(blocks[cut:], *parted)
            return parted[0] if streams == 1 else torch.cat(parted, dim)

        return net

    return build


def _call(f: Run, *args: Any) -> Any:
    return f(*args)


def _checkpoint(f: Run, *args: Any) -> Any:
    return checkpoint(f, *args, use_reentrant=False)


def _selective(kept: list[Any]) -> Run:
    return partial(_checkpoint_with, context_fn=partial(create_selective_checkpoint_contexts, kept))


def _checkpoint_with(f: Run, *args: Any, context_fn: Any) -> Any:
    return checkpoint(f, *args, use_reentrant=False, context_fn=context_fn)


# --- the other libraries --------------------------------------------------------------------------------------------

PEERS = {"revlib": "1.7.2", "memcnn": "1.5.2", "revtorch": "0.2.4", "reformer-pytorch": "1.4.4"}


def _pairs(blocks: Blocks) -> list[tuple[nn.Module, nn.Module]]:
    return list(zip(blocks[::2], blocks[1::2], strict=True))


def _import(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say of torch's deprecations is for their authors
        return importlib.import_module(name)


def _revlib(blocks: Blocks, dim: int) -> Net:
    return _import("revlib").ReversibleSequential(*blocks, split_dim=dim)


def _revtorch(blocks: Blocks, dim: int) -> Net:
    revtorch = _import("revtorch")
    pairs = [revtorch.ReversibleBlock(f, g, split_along_dim=dim) for f, g in _pairs(blocks)]
    return revtorch.ReversibleSequence(nn.ModuleList(pairs))


def _memcnn(blocks: Blocks, dim: int) -> Net:
    memcnn = _import("memcnn")
    net = nn.Sequential(
        *(memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g, split_dim=dim)) for f, g in _pairs(blocks))
    )
    return lambda x: net(x.clone())  # it empties its input


def _reformer(blocks: Blocks, dim: int) -> Net:
    # The package's __init__ needs half a dozen other packages; the file alone needs torch.
    spec = importlib.util.find_spec("reformer_pytorch")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'reformer_pytorch'")
    path = f"{spec.submodule_search_locations[0]}/reversible.py"
    file = importlib.util.spec_from_file_location("reformer_pytorch_reversible", path)
    assert file is not None
    assert file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    net = module.ReversibleSequence(nn.ModuleList(nn.ModuleList(pair) for pair in _pairs(blocks)))
    if dim == 2:
        return net

    def parted_elsewhere(x: Tensor) -> Tensor:
        if x.dim() > 2:
            raise NotImplementedError(f"it parts dimension 2 and no other; here the streams lie in dimension {dim}")
        return net(x.unsqueeze(1)).squeeze(1)

    return parted_elsewhere
