"""What the comparison of a block's two runs costs, and how far from a false alarm it stays.

    python -m benchmarks.second_run cost           # a ratio, interleaved in one process: an idle machine, some minutes
    python -m benchmarks.second_run alarms         # trains the demo's model, 10,000 steps in each of three dtypes

``alarms`` counts errors, and tells the least factor in front of ``eps`` and of the drift with which none would have
been raised (a power of two; 16 are allowed: ``docs/numerics.md``, "What is checked").
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.torch_engine.workloads import workloads
from revcore import InversionError
from revcore.demo.config import Config
from revcore_torch import Reverse, ReversibleSequential, determinism
from revcore_torch.demo import LanguageModel

CHECKS = ("values", "shapes")


def cost(depth: int, rounds: int) -> None:
    """Print a training step's time with the comparison over that without."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, depth {depth}, {rounds} rounds")
    print(f"{'network of benchmarks.torch_engine':<42}{'values / shapes':>16}   quartiles")
    for name in ("transformer", "conv", "trivial"):
        workload = workloads()[name]
        model, x = ReversibleSequential(*workload.blocks(depth), split_dim=workload.dim), workload.input(2)

        def step(check: str, model: Any = model, x: torch.Tensor = x) -> float:
            model.determinism_check = check
            start = time.perf_counter()
            model(x).square().mean().backward()
            return time.perf_counter() - start

        ratios = []
        for i in range(rounds + 2):
            times = {check: step(check) for check in (CHECKS if i % 2 else reversed(CHECKS))}
            ratios.append(times["values"] / times["shapes"])
        low, middle, high = statistics.quantiles(ratios[2:], n=4)
        print(f"{f'{name}, {workload.shape}':<42}{middle:>16.3f}   {low:.3f} to {high:.3f}")


class Margin:
    """Notes of each comparison the least factor that would have raised nothing."""

    def __init__(self) -> None:
        self.needed: Counter[float] = Counter()
        self._broken, self._surely = determinism._Rule.broken, determinism._Rule.is_surely_met

    def __enter__(self) -> Margin:
        rule: Any = determinism._Rule
        rule.broken = lambda rule, *values: self.broken(rule, *values)
        rule.is_surely_met = lambda _, __, one, other: bool((one == other).all())
        return self

    def __exit__(self, *_: object) -> None:
        determinism._Rule.broken, determinism._Rule.is_surely_met = self._broken, self._surely

    def broken(self, *given: Any) -> str | None:
        allowed = determinism._FACTOR
        words, factor = self._broken(*given), allowed
        while words is None and factor > 2.0**-10:
            determinism._FACTOR = factor / 2
            if self._broken(*given) is not None:
                break
            factor /= 2
        determinism._FACTOR = allowed
        self.needed[factor] += 1
        return words


def alarms(steps: int, batch: int, context: int) -> None:
    """Train the demo's model in three dtypes."""
    text = torch.frombuffer(bytearray(Path(torch.__file__).read_bytes()), dtype=torch.uint8).long()
    print(f"torch {torch.__version__}, {steps} steps of the demo's model, batch {batch}, context {context}")
    print(f"{'streams, blocks':<34}{'steps':>8}{'alarms':>8}{'first loss':>12}{'last loss':>11}{'needed factor':>15}")
    for name in ("float32, float32", "float32, bfloat16 autocast", "float32, bfloat16"):
        torch.manual_seed(0)
        config = Config(context=context, batch=batch)
        model, autocast = LanguageModel(config, Reverse()), name.endswith("autocast")
        if name.endswith(", bfloat16"):
            model.body.stream_dtype = "float32"
            model = model.bfloat16()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        raised, losses = 0, []
        with Margin() as margin:
            for _ in range(steps):
                at = torch.randint(len(text) - context - 1, (batch, 1)) + torch.arange(context + 1)
                tokens = text[at]
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    logits = model(tokens[:, :-1])
                loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
                try:
                    loss.backward()
                except InversionError:
                    raised += 1
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.item())
        first, last = (statistics.mean(part) for part in (losses[:10], losses[-10:]))
        print(
            f"{name:<34}{steps:>8}{raised:>8}{first:>12.3f}{last:>11.3f}{max(margin.needed, default=0.0):>15g}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "alarms"])
    parser.add_argument("--depth", type=int, default=24, help="blocks (cost); default 24")
    parser.add_argument("--rounds", type=int, default=40, help="pairs of steps (cost); default 40")
    parser.add_argument(
        "--steps", type=int, default=10_000, help="training steps in each dtype (alarms); default 10,000"
    )
    parser.add_argument("--batch", type=int, default=2, help="sequences a step (alarms); default 2")
    parser.add_argument("--context", type=int, default=32, help="tokens a sequence (alarms); default 32")
    given = parser.parse_args()
    if given.what == "cost":
        cost(given.depth, given.rounds)
    else:
        alarms(given.steps, given.batch, given.context)


if __name__ == "__main__":
    main()
