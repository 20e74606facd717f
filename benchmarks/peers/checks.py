"""Whether a network of some way does what the plain network does: each answer a cell of the table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.torch_engine import measure
from benchmarks.torch_engine.measure import Step
from benchmarks.torch_engine.ways import Way
from benchmarks.torch_engine.workloads import Workload

RIGHT = 1e-10  # of float64, after some rebuilding


class RecordedDropout(nn.Module):
    """Dropout that keeps the masks it has drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = F.dropout(torch.ones_like(x), 0.5)
        self.drawn.append(mask.detach())
        return x * mask


def _norm(_: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(3), nn.Linear(8, 8))


def _dropout(_: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), RecordedDropout())


# Streams lie in dimension 2, where all libraries can part them; so BatchNorm's channels are the three steps of time.
NORM = Workload("BatchNorm", _norm, (4, 3, 8), 2)
DROPOUT = Workload("dropout", _dropout, (4, 3, 8), 2)


@dataclass
class Checks:
    """What was found of one way, each a cell of the table, and the words of errors."""

    output: str = "–"
    gradients: str = "–"
    input: str = "–"
    autograd_grad: str = "–"
    norm: str = "–"
    dropout: str = "–"
    errors: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Whether ``backward()`` gives wrong gradients, or none."""
        return not self.gradients == self.input == "right"


def error_of(got: Tensor, expected: Tensor) -> float:
    """Return the relative error of one vector."""
    return float((got - expected).norm() / expected.norm())


def judged(error: float) -> str:
    """Return a relative error in words.

    >>> judged(3e-16), judged(0.456), judged(12.0), judged(float("nan"))
    ('right', '**wrong by 46 %**', '**wrong by 1,200 %**', '**wrong: nan**')
    """
    if error < RIGHT:
        return "right"
    percent = f"{100 * error:.2g}" if error < 1 else f"{100 * error:,.0f}"
    return f"**wrong by {percent} %**" if math.isfinite(error) else f"**wrong: {error}**"


def check(way: Way, plain: Way, toy: Workload, depth: int) -> Checks:
    """Check one way against the plain network of its coupling."""
    found = Checks()

    def attempt(name: str, what: str, cell: Callable[[], str]) -> None:
        try:
            setattr(found, name, cell())
        except Exception as error:  # whatever it is belongs in the table
            setattr(found, name, "**raises**")
            line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            found.errors.append(f"{what}: {type(error).__name__}: {line}")

    attempt("output", "output", lambda: output(way, plain, toy, depth))
    errors: list[float] = []

    def of_input() -> str:
        errors.extend(gradient_errors(way, plain, toy, depth))
        return judged(errors[0])

    attempt("input", "backward()", of_input)
    found.gradients = judged(errors[1]) if errors else found.input
    attempt("autograd_grad", "autograd.grad", lambda: autograd_grad(way, plain, toy, depth))
    attempt("norm", "BatchNorm", lambda: norm_counts(way))
    attempt("dropout", "dropout", lambda: masks(way))
    return found


def output(way: Way, plain: Way, toy: Workload, depth: int) -> str:
    """Judge the output, and say so where a stream of it is empty."""
    blocks, x = toy.blocks(depth, dtype=torch.float64), toy.input(2, dtype=torch.float64)
    got, expected = (each.build(blocks, toy.dim)(x).detach() for each in (way, plain))
    empty = " (a stream of zeros)" if any(not stream.any() for stream in got.chunk(2, toy.dim)) else ""
    return judged(error_of(got, expected)) + empty


def gradient_errors(way: Way, plain: Way, toy: Workload, depth: int) -> tuple[float, float]:
    """Return the relative errors of the input's gradient, and of those of all parameters."""
    blocks, x = toy.blocks(depth, dtype=torch.float64), toy.input(2, dtype=torch.float64)
    expected, got = (measure.gradients(Step(each.build(blocks, toy.dim), x), blocks) for each in (plain, way))
    n = x.numel()
    return error_of(got[:n], expected[:n]), error_of(got[n:], expected[n:])


def autograd_grad(way: Way, plain: Way, toy: Workload, depth: int) -> str:
    """Say what ``autograd.grad`` gives."""
    blocks, x = toy.blocks(depth, dtype=torch.float64), toy.input(2, dtype=torch.float64)
    leaves = [x, *(p for block in blocks for p in block.parameters())]

    def gradients(each: Way) -> tuple[Tensor | None, ...]:
        loss = each.build(blocks, toy.dim)(x).square().mean()
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    expected, got = gradients(plain), gradients(way)
    absent = sum(g is None for g in got)
    if absent:
        return f"**None for {absent} of {len(got)}**"
    flat = [torch.cat([g.flatten() for g in each if g is not None]) for each in (got, expected)]
    return judged(error_of(*flat))


def norm_counts(way: Way, depth: int = 4) -> str:
    """Return how often BatchNorm layers have counted after one step."""
    blocks = NORM.blocks(depth)
    Step(way.build(blocks, NORM.dim), NORM.input(2))()
    counts = sorted(
        {int(m.num_batches_tracked or 0) for b in blocks for m in b.modules() if isinstance(m, nn.BatchNorm1d)}
    )
    return ", ".join(map(str, counts))


def masks(way: Way, depth: int = 4) -> str:
    """Say whether each block drew one and the same mask whenever it ran."""
    blocks = DROPOUT.blocks(depth)
    Step(way.build(blocks, DROPOUT.dim), DROPOUT.input(2))()
    drawn = [m.drawn for b in blocks for m in b.modules() if isinstance(m, RecordedDropout)]
    if all(len(each) == 1 for each in drawn):
        return "ran once"
    same = all(torch.equal(first, mask) for first, *others in drawn for mask in others)
    return "replayed" if same else "**drawn anew**"
