"""Exact arithmetic: what it does to training, to gradients, to time and to memory, on CPU in torch.

    python -m benchmarks.exact            fourteen minutes on two busy cores
    python -m benchmarks.exact --write    adds a dated table and picture to benchmarks/results

Training: held-out losses of three seeds, ordinary and exact from equal weights on equal batches. Digits are
scikit-learn's, through pre-LN MLPs whose outputs have root mean square 1; text is the demo's, with its model, smaller.
A mean of exact runs is judged by the least and the largest loss of the ordinary ones; with 4 bits it is only shown.

Momentum 0.5: the error of the first batch's gradient against the same network's with everything stored, and training.

Time: one gradient of the demo's blocks, in interleaved rounds in one process. Memory: bytes that live after the forward
pass, counted at two depths.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from benchmarks.drift import WIDTH, Block
from benchmarks.shared import Ratio, interleaved, markdown, table
from revcore import (
    BDIA,
    Coupling,
    DriftWarning,
    Exact,
    LinearCoupling,
    Momentum,
    Program,
    Reverse,
    StoreAll,
    bdia,
    revnet,
)
from revcore.coupling import Additive
from revcore.demo.config import Config, first_weights
from revcore.demo.text import Corpus, standard_text
from revcore.pictures import STYLE, load_pyplot
from revcore_torch import ReversibleSequential, reversible
from revcore_torch.demo import MLP, Attention, Model
from revcore_torch.memory import LiveBytes

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
BITS, PROMISED = (4, 8, 12), 8  # what is tried, and from where on it is promised
DEPTH, DEEP, EPOCHS, BATCH, RATE = 8, 32, 10, 64, 1e-3
TEXT = Config(depth=8, steps=200, width=32, context=48, batch=8)
PROGRAMS: dict[str, Callable[[int], Program]] = {
    "additive": revnet,
    "momentum 0.9": lambda depth: revnet(depth, Momentum(0.9)),
    "BDIA": lambda depth: ordinary(bdia(depth)),
}
WAYS: dict[str, tuple[bool, dict[str, Any] | None]] = {  # whether all is stored, and how it is exact
    "store-all": (True, None),
    "reversible": (False, None),
    "exact, store-all": (True, {}),
    "exact, no checksum": (False, {"checksum": False}),
    "exact": (False, {}),
    "exact, guard=1": (False, {"guard": 1}),
    "exact, guard=4": (False, {"guard": 4}),
}
CARRIED: dict[str, LinearCoupling] = {
    "Additive()": Additive(),
    "Momentum(0.99)": Momentum(0.99),
    "Momentum(0.9)": Momentum(0.9),
    "Momentum(0.5), BDIA(0.5)": Momentum(0.5),
    "Momentum(0.3)": Momentum(0.3),
    "Momentum(0.1)": Momentum(0.1),
}
GUARDS = (0, 1, 2, 4)


def ordinary(program: Program) -> Program:
    """Return the program that ``program`` makes exact."""

    def inner(coupling: Coupling) -> Coupling:
        return coupling.coupling if isinstance(coupling, Exact) else coupling

    steps: list[Any] = [dataclasses.replace(s, coupling=inner(s.coupling)) for s in program.unrolled]  # type: ignore[union-attr, call-arg]
    return dataclasses.replace(program, steps=tuple(steps))


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one run came to: held-out loss at the end, and the training loss of every epoch."""

    loss: float
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class Runs:
    """Runs with the same settings, one for each seed."""

    of: tuple[Run, ...]

    @property
    def losses(self) -> list[float]:
        return [run.loss for run in self.of]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    def within(self, other: Runs) -> bool:
        """Return whether the mean lies between the least and the largest of ``other``'s losses."""
        return min(other.losses) <= self.mean <= max(other.losses)

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({min(self.losses):.4f} to {max(self.losses):.4f})"


class Digits(nn.Module):
    """Images of 64 pixels → logits of 10 classes, through pre-LN MLPs."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.stem = nn.Linear(64, WIDTH * (2 if program.split == "chunk" else 1))
        blocks = [Block(affine=False, fresh=False) for _ in range(program.num_blocks)]
        self.body = ReversibleSequential(*blocks, program=program)
        self.head = nn.Linear(WIDTH * (2 if program.merge == "concat" else 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        return self.head(nn.functional.layer_norm(x, x.shape[-1:]))


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return images and labels: to train on, and every fifth held out."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    x, y = torch.from_numpy(found.data.astype(np.float32) / 8 - 1), torch.from_numpy(found.target.astype(np.int64))
    held_out = torch.arange(len(y)) % 5 == 0
    return (x[~held_out], y[~held_out]), (x[held_out], y[held_out])


def network(program: Program, seed: int, policy: Any = Reverse()) -> Digits:  # noqa: B008 - frozen
    torch.manual_seed(seed)
    net = Digits(program)
    net.body.policy = policy
    return net


def train_digits(program: Program, seed: int, policy: Any = Reverse(), epochs: int = EPOCHS) -> Run:  # noqa: B008
    """Train with Adam."""
    (x, y), (held_x, held_y) = digits()
    net = network(program, seed, policy)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    generator, curve = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        losses = []
        for part in torch.randperm(len(y), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x[part]), y[part])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curve.append(statistics.fmean(losses))
    with torch.no_grad():
        return Run(nn.functional.cross_entropy(net(held_x), held_y).item(), tuple(curve))


def train_text(momentum: float | None, bits: int | None, seed: int, config: Config = TEXT) -> Run:
    """Train the demo's model as the demo does, with its program's couplings changed."""

    class Changed(Config):
        @property
        def program(self) -> Program:
            steps = [
                dataclasses.replace(s, coupling=Momentum(momentum) if momentum else Additive())  # type: ignore[call-arg]
                for s in super().program.unrolled
            ]
            program = Program(steps)
            return program if bits is None else program.exact(bits)

    config = Changed(**{**dataclasses.asdict(config), "seed": seed})
    corpus, model = Corpus(standard_text(), config), Model(config, "cpu")
    model.load({f"weights.{name}": array for name, array in first_weights(config).items()})
    for step in range(config.steps):
        model.train_step(corpus.batch(step), config.rate_at(step))
    return Run(statistics.fmean(model.loss(tokens) for tokens in corpus.held_out(16)))


# --- momentum 0.5 -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """Relative gradient errors against the same network with everything stored: of all, and of the worst block."""

    overall: float
    worst: float
    bitwise: bool


def gradient_errors(program: Program, seed: int = 0) -> Errors:
    """Compare the first batch's gradients."""
    (x, y), _ = digits()

    def gradients(policy: Any) -> list[list[Tensor]]:
        net = network(program, seed, policy)
        nn.functional.cross_entropy(net(x[:BATCH]), y[:BATCH]).backward()
        parts = net.stem, *net.body, net.head
        return [[p.grad for p in part.parameters() if p.grad is not None] for part in parts]

    found, true = gradients(Reverse()), gradients(StoreAll())

    def error(got: list[Tensor], expected: list[Tensor]) -> float:
        a, b = (torch.cat([t.double().flatten() for t in ts]) for ts in (got, expected))
        return float((a - b).norm() / b.norm())

    every = [[grad for part in parts for grad in part] for parts in (found, true)]
    return Errors(
        error(*every),
        max(error(a, b) for a, b in zip(found, true, strict=True)),
        all(map(torch.equal, *every)),
    )


# --- time and memory --------------------------------------------------------------------------------------------------


class Wall:
    """A clock on the wall, for :func:`benchmarks.shared.interleaved`."""

    def seconds(self, step: Any, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats


def gradient_steps(coupling: Coupling, depth: int = 16, width: int = 64) -> dict[str, Callable[[], None]]:
    """Return one gradient of the demo's blocks in every one of :data:`WAYS`."""
    torch.manual_seed(0)
    blocks = [(MLP if i % 2 else Attention)(width) for i in range(depth)]
    x = torch.randn(16, 64, 2 * width)

    def made(stored: bool, how: dict[str, Any] | None) -> Callable[[], None]:
        program = revnet(depth, coupling)
        program = program if how is None else program.exact(**how)
        policy = StoreAll() if stored else Reverse()
        net = ReversibleSequential(*blocks, program=program, split_dim=-1, policy=policy)
        return lambda: net(x).square().mean().backward()

    return {name: made(*way) for name, way in WAYS.items()}


@dataclass(frozen=True)
class Held:
    """What is kept more than in ordinary mode: bits an element and step, and bytes a step for the checksum."""

    stated: int
    bits: float
    checksum: float


def held(
    coupling: LinearCoupling, guard: int, depths: tuple[int, int] = (8, 24), shape: tuple[int, int] = (32, 64)
) -> Held:
    """Count what lives after the forward pass at two depths."""

    def grown(exact: Callable[[Program], Program]) -> float:
        lived = []
        for depth in depths:
            blocks = [nn.Linear(shape[-1], shape[-1]) for _ in range(depth)]
            x = [torch.randn(shape) for _ in range(2)]
            with LiveBytes() as memory:
                out = reversible(exact(revnet(depth, coupling)), blocks, x)
                lived.append(memory.live)
            del out
        return (lived[1] - lived[0]) / (depths[1] - depths[0])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        base = grown(lambda program: program)
    alone = grown(lambda program: program.exact(guard=guard, checksum=False))
    checked = grown(lambda program: program.exact(guard=guard))
    elements = shape[0] * shape[1]
    return Held(Exact(coupling, guard=guard).carry_bits, 8 * (alone - base) / elements, checked - alone)


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """All that was measured."""

    training: dict[tuple[str, str, int | None], Runs] = field(default_factory=dict)  # data, coupling, bits
    errors: dict[str, Errors] = field(default_factory=dict)
    deep: dict[str, Runs | None] = field(default_factory=dict)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    held: dict[tuple[str, int], Held] = field(default_factory=dict)


def claims(found: Found) -> list[tuple[str, bool]]:
    """Return what is promised, and whether it was found."""
    made = [
        (f"{data}, {coupling}, bits={bits}: the mean lies within the ordinary runs'", runs.within(base))
        for (data, coupling, bits), runs in found.training.items()
        if bits is not None and bits >= PROMISED and (base := found.training.get((data, coupling, None)))
    ]
    if found.errors:
        made += [
            ("momentum 0.5: ordinary mode loses a gradient (error ≥ 0.45)", found.errors["ordinary"].worst >= 0.45),
            ("momentum 0.5: exact gradients are store-all's, bit for bit", found.errors["exact"].bitwise),
        ]
    if found.deep:
        exact, true = found.deep["exact"], found.deep["store-all"]
        made.append(("momentum 0.5: exact trains as store-all does", bool(exact and true and exact.within(true))))
    if found.held:
        made.append(("what is kept is what is stated", all(h.bits == h.stated for h in found.held.values())))
    return made


def report(found: Found) -> str:
    """Return all tables as Markdown."""
    promised = table("promised", "")
    for words, ok in claims(found):
        promised.add_row(words, "yes" if ok else "**no**")
    training = table("held-out loss", "ordinary", *(f"bits={b}" for b in BITS))
    for data, coupling in dict.fromkeys(key[:2] for key in found.training):
        base = found.training[data, coupling, None]
        row = [found.training.get((data, coupling, bits)) for bits in (None, *BITS)]
        shown = ("" if runs is None else f"{runs}{'' if runs.within(base) else ' **outside**'}" for runs in row)
        training.add_row(f"{data}, {coupling}", *shown)
    broken = table(f"momentum 0.5, depth {DEEP}, float32", "gradient error", "of the worst part", "held-out loss")
    for name, runs in found.deep.items():
        e = found.errors.get(name)
        errors = ("", "") if e is None else ("0, bitwise",) * 2 if e.bitwise else (f"{e.overall:.2g}", f"{e.worst:.2g}")
        broken.add_row(name, *errors, "not finite" if runs is None else str(runs))
    cost = table("time by reversible's", *found.seconds)
    for way in WAYS:
        ratios = [Ratio.of(seconds[way], seconds["reversible"]) for seconds in found.seconds.values()]
        cost.add_row(way, *(f"{r} ({r.low:.2f} to {r.high:.2f})" for r in ratios))
    kept = table("bits an element and step", *(f"guard={g}" for g in GUARDS), "checksum, bytes a step")
    for name in dict.fromkeys(name for name, _ in found.held):
        row = [found.held[name, guard] for guard in GUARDS]
        kept.add_row(name, *(f"{h.bits:g}" for h in row), f"{row[0].checksum:g}")
    parts = [
        markdown(promised),
        "Mean of three seeds (least to largest), float32.",
        markdown(training),
        markdown(broken),
        f"Median of {len(next(iter(next(iter(found.seconds.values())).values())))} rounds (quartiles)."
        if found.seconds
        else "",
        markdown(cost),
        "Counted, more than in ordinary mode; float32 streams.",
        markdown(kept),
    ]
    return "\n\n".join(part for part in parts if part)


def picture(path: Path, found: Found) -> None:
    """Draw the training losses of momentum 0.5, one line a seed."""
    pyplot = load_pyplot()
    with pyplot.rc_context(STYLE):
        figure, axis = pyplot.subplots(figsize=(7, 4))
        for i, (name, runs) in enumerate(found.deep.items()):
            for k, run in enumerate(runs.of if runs else ()):
                label, epochs = (name if k == 0 else None), range(1, len(run.curve) + 1)
                axis.plot(epochs, run.curve, color=f"C{i}", label=label, alpha=0.8, ls=("-", "--", ":")[i % 3])
        axis.set(yscale="log", xlabel="epoch", title=f"Momentum 0.5 at depth {DEEP}, digits: training loss")
        axis.legend()
        figure.savefig(path)
        pyplot.close(figure)


def jobs() -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Return all training runs: where each belongs, and the function with its arguments."""
    made: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for seed, bits in product(SEEDS, (None, *BITS)):
        for name, build in PROGRAMS.items():
            program = build(DEPTH)
            made["digits", name, bits, seed] = train_digits, program if bits is None else program.exact(bits), seed
        for name, beta in {"additive": None, "momentum 0.9": 0.9}.items():
            made["text", name, bits, seed] = train_text, beta, bits, seed
    for (name, (program, policy)), seed in product(deep_ways().items(), SEEDS):
        made["deep", name, seed] = train_digits, program, seed, policy
    return made


def deep_ways() -> dict[str, tuple[Program, Any]]:
    program = revnet(DEEP, Momentum(0.5))
    return {
        "store-all": (program, StoreAll()),
        "ordinary": (program, Reverse()),
        "exact": (program.exact(), Reverse()),
    }


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DriftWarning)  # what is shown here


def measure(started: Callable[[str, int], Any], tick: Callable[[Any], None], rounds: int = 15) -> Found:
    """Measure everything. ``started`` hears of each part and how much it is, and ``tick`` of every piece done."""
    found, work = Found(), jobs()
    part = started("training, in two processes", len(work))
    with ProcessPoolExecutor(2, get_context("spawn"), _quiet) as pool:
        futures = {where: pool.submit(*job) for where, job in work.items()}
        for future in futures.values():
            future.add_done_callback(lambda _: tick(part))
        runs = {where: future.result() for where, future in futures.items()}

    def of(*where: Any) -> Runs:
        return Runs(tuple(runs[*where, seed] for seed in SEEDS))

    for where in dict.fromkeys(where[:-1] for where in runs):
        if where[0] == "deep":
            made = of(*where)
            found.deep[where[1]] = made if all(map(math.isfinite, made.losses)) else None
        else:
            found.training[where] = of(*where)
    _quiet()
    found.errors = {name: gradient_errors(deep_ways()[name][0]) for name in ("ordinary", "exact")}
    timed = {"additive": Additive(), "momentum 0.9": Momentum(0.9), "BDIA": BDIA(0.5)}
    part = started("time", len(timed) * rounds * len(WAYS))
    for name, coupling in timed.items():
        steps = gradient_steps(coupling)
        found.seconds[name] = interleaved(steps, Wall(), rounds, least=0.0, tick=lambda part=part: tick(part))
    part = started("memory", len(CARRIED) * len(GUARDS))
    for (name, coupling), guard in product(CARRIED.items(), GUARDS):
        found.held[name, guard] = held(coupling, guard)
        tick(part)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print what came out; 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write a dated file and picture to benchmarks/results")
    options = parser.parse_args(arguments)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress:
        found = measure(lambda part, total: progress.add_task(part, total=total), progress.advance)
    text = (
        f"Exact arithmetic: torch {torch.__version__} on {platform.machine()}, one thread a process.\n"
        f"python -m benchmarks.exact\n\n{report(found)}\n"
    )
    Console(width=240).print(text, markup=False, highlight=False)
    if options.write:
        path = RESULTS / f"{datetime.date.today()}-exact.md"
        path.write_text(text)
        picture(path.with_suffix(".png"), found)
        print(f"written: {path}, {path.with_suffix('.png')}")
    return int(not all(ok for _, ok in claims(found)))


if __name__ == "__main__":
    raise SystemExit(main())
