"""A deep Reformer on a long context: memory and gradients, beside reformer-pytorch's own reversible network.

    python -m benchmarks.reformer            two and a half minutes of one core
    python -m benchmarks.reformer --write    adds a dated table to benchmarks/results

All ways run reformer-pytorch's layers, with the same weights, random hashes and input, on CPU in float32. Memory: the
bytes of tensors that live after the forward pass, at the peak of the training step, and when all is done, beyond
weights, input and their gradients.

Gradients, over several seeds: the worst relative error, over all weights, against the network with everything stored;
and tipped, the buckets that came out otherwise in the second run, of all that tokens were hashed into.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.shared import machine, markdown, table
from examples.reformer import KEEP_BUCKETS, parts
from revcore import Checkpoint, Policy, Reverse, StoreAll
from revcore_torch import ReversibleSequential
from revcore_torch.memory import LiveBytes

RESULTS = Path(__file__).parent / "results"
WIDTH, HEADS, CHUNKS = 64, 4, 16


@dataclass(frozen=True)
class Size:
    """How large it is: layers of two blocks, one sequence of ``context``, hashed ``hashes`` times into buckets."""

    depth: int = 12
    context: int = 1024
    hashes: int = 4
    bucket: int = 64
    seeds: int = 5


def layers(size: Size) -> nn.ModuleList:
    """Return pairs of an attention and a feed-forward layer, each behind a LayerNorm."""
    given = parts()
    pairs = nn.ModuleList()
    for _ in range(size.depth):
        attention = given.LSHSelfAttention(WIDTH, HEADS, size.bucket, size.hashes, causal=True)
        feed_forward = given.Chunk(CHUNKS, given.FeedForward(WIDTH), along_dim=-2)
        pairs.append(nn.ModuleList(given.PreNorm(nn.LayerNorm, WIDTH, layer) for layer in (attention, feed_forward)))
    return pairs


def ours(policy: Policy) -> Callable[[nn.ModuleList], nn.Module]:
    """Return what makes our network of the layers, which keep no buckets from their last call in it."""

    def make(pairs: nn.ModuleList) -> nn.Module:
        for module in pairs.modules():
            if isinstance(module, parts().LSHAttention):
                module.register_forward_hook(lambda module, *_: setattr(module, "_cache", {}))
        blocks = [block for pair in pairs for block in cast(nn.ModuleList, pair)]
        # buckets that tip are what is measured, and many of them are refused otherwise
        return ReversibleSequential(*blocks, split_dim=-1, policy=policy, determinism_check="shapes")

    return make


def theirs(pairs: nn.ModuleList) -> nn.Module:
    """Return reformer-pytorch's network of the layers, which hands their buckets on to the second run."""
    from reformer_pytorch.reversible import ReversibleSequence

    return ReversibleSequence(pairs, send_signal=True)


WAYS: dict[str, Callable[[nn.ModuleList], nn.Module]] = {
    "store-all": ours(StoreAll()),
    "Checkpoint()": ours(Checkpoint()),
    "reformer-pytorch": theirs,
    "Reverse(), buckets kept": ours(KEEP_BUCKETS),
    "Reverse()": ours(Reverse()),
}


@dataclass(frozen=True)
class Figures:
    """Of one training step: bytes held, at the peak and left; its gradient; buckets tipped, of how many."""

    held: int
    peak: int
    left: int
    gradient: Tensor
    tipped: int
    buckets: int


def measure(make: Callable[[nn.ModuleList], nn.Module], size: Size, seed: int) -> Figures:
    """Run one training step; ``seed`` is that of weights, input and hashes."""
    torch.manual_seed(seed)
    pairs = layers(size)
    net, x = make(pairs), torch.randn(1, size.context, 2 * WIDTH, requires_grad=True)
    weights = list(pairs.parameters())
    for leaf in (*weights, x):
        leaf.grad = torch.zeros_like(leaf)
    lsh = parts().LSHAttention
    plain, hashed = lsh.hash_vectors, []

    def hash_vectors(*args: Any, **kwargs: Any) -> Tensor:
        buckets = plain(*args, **kwargs)
        hashed.append(buckets.numpy().copy())  # which is no tensor, and does not count
        return buckets

    with mock.patch.object(lsh, "hash_vectors", hash_vectors), LiveBytes() as memory:
        loss = net(x).square().mean()
        held = memory.live
        loss.backward()
        del loss
        left, peak = memory.live, memory.peak
    first, second = hashed[: size.depth], hashed[: size.depth - 1 : -1]
    tipped = sum(int((a != b).sum()) for a, b in zip(first, second, strict=False))
    gradient = torch.cat([cast(Tensor, weight.grad).flatten() for weight in weights])
    return Figures(held, peak, left, gradient, tipped, sum(buckets.size for buckets in second))


def report(size: Size) -> str:
    """Measure every way, and return a table."""
    made = table("way", "held", "peak", "left", "error", "tipped")
    expected: list[Tensor] = []
    for name, make in WAYS.items():
        runs = [measure(make, size, seed) for seed in range(size.seeds)]
        expected = expected or [run.gradient for run in runs]
        errors = [float((run.gradient - g).norm() / g.norm()) for run, g in zip(runs, expected, strict=True)]
        bytes_of = (f"{number / 2**20:.2f} MiB" for number in (runs[0].held, runs[0].peak, runs[0].left))
        tipped = f"{sum(run.tipped for run in runs):,} of {sum(run.buckets for run in runs):,}"
        made.add_row(name, *bytes_of, f"{max(errors):.1e}", tipped if runs[0].buckets else "–")
    return markdown(made)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write a dated file to benchmarks/results")
    options = parser.parse_args(arguments)
    size = Size()
    text = (
        f"{size.depth} layers, two streams of {WIDTH}, 1 × {size.context}, {HEADS} heads, {size.hashes} hashes into "
        f"buckets of {size.bucket}, feed-forward in {CHUNKS} chunks, float32; {size.seeds} seeds.\n"
        f"{machine('torch', 'reformer-pytorch')}.\n"
        f"python -m benchmarks.reformer\n\n{report(size)}\n"
    )
    print(text)
    if options.write:
        path = RESULTS / f"{datetime.date.today()}-reformer.md"
        path.write_text(text)
        print(f"written: {path}")


if __name__ == "__main__":
    main()
