"""How the backward pass gets its activations: stored, checkpointed, by four other libraries, and by this one.

A way makes a function of the joined streams out of blocks. All ways get the very same blocks, so nothing but the way
differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from benchmarks import libraries
from benchmarks.libraries import ADDITIVE, Kind, Net
from benchmarks.torch_engine.workloads import Blocks
from revcore_torch import Checkpoint, MemoryBudget, Reverse, ReversibleSequential, StoreAll

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
PEERS = (libraries.REVLIB, libraries.MEMCNN, libraries.REVTORCH, libraries.REFORMER)
REVLIB = libraries.REVLIB.name
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
        Way(PLAIN[2], "stored", by_hand(run_plain)),
        Way(PLAIN[1], "stored", by_hand(run_plain, streams=1), streams=1),
        Way(CHECKPOINT_BLOCK, "checkpoint", by_hand(run_checkpoint)),
        Way(CHECKPOINT_PAIR, "checkpoint", by_hand(run_checkpoint, every=2)),
        Way("checkpoint, one stream", "checkpoint", by_hand(run_checkpoint, streams=1), streams=1),
        *(Way(f"checkpoint, {n} blocks", "checkpoint", by_hand(run_checkpoint, every=n), frontier=True) for n in every),
        *(
            Way(f"checkpoint, last {n} stored", "checkpoint", by_hand(run_checkpoint, keep_last=n), frontier=True)
            for n in some
        ),
        *(
            Way(f"checkpoint, keeps {name}", "checkpoint", by_hand(_selective(kept)), frontier=True)
            for name, kept in selections.items()
        ),
        *(Way(library.name, "peer", library.build()) for library in PEERS),
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


def by_hand(
    run: Run, every: int | None = None, keep_last: int = 0, streams: int = 2, kind: Kind = ADDITIVE
) -> Callable[[Blocks, int], Net]:
    """A network written out: ``run`` calls each block, or each ``every`` blocks with their couplings."""

    def build(blocks: Blocks, dim: int) -> Net:
        cut = len(blocks) - keep_last

        def part(some: Blocks, *given: Tensor, call: Run = run_plain) -> tuple[Tensor, ...]:
            x, *other = given
            for block in some:
                if other:  # a half-step: the stream it changed comes last next time
                    x, other = other[0], [kind.forward(x, call(block, other[0]))]
                else:
                    x = kind.forward(x, call(block, x))
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


def run_plain(f: Run, *args: Any) -> Any:
    return f(*args)


def run_checkpoint(f: Run, *args: Any) -> Any:
    return checkpoint(f, *args, use_reentrant=False)


def _selective(kept: list[Any]) -> Run:
    return partial(_checkpoint_with, context_fn=partial(create_selective_checkpoint_contexts, kept))


def _checkpoint_with(f: Run, *args: Any, context_fn: Any) -> Any:
    return checkpoint(f, *args, use_reentrant=False, context_fn=context_fn)
