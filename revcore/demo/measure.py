"""What the demo proves after training: equal gradients, equal curves, and memory that does not grow with depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from revcore.demo.backend import Dtype, Model
from revcore.demo.checkpoint import Checkpoint
from revcore.demo.config import Config, first_weights
from revcore.parity import EPS, Record, Report, compare
from revcore.policy import Checkpoint as Checkpointing
from revcore.policy import Policy, Reverse, StoreAll

DEPTHS = (8, 16, 32, 64)
POLICIES: dict[str, Policy] = {"store-all": StoreAll(), "checkpointing": Checkpointing(), "reversible": Reverse()}
Backends = Mapping[str, type[Model]]


def gradients(
    model: type[Model], run: Checkpoint, tokens: np.ndarray, device: str, dtype: Dtype, policy: Policy
) -> Record:
    """Return the loss and the gradients of a run's weights on ``tokens``."""
    net = model(run.config, device, dtype, policy)
    net.load(run.state)
    loss, grads = net.gradients(tokens)
    return Record({"loss": loss}, grads, run.config.depth, dtype)


def parity(backends: Backends, run: Checkpoint, tokens: np.ndarray, device: str) -> dict[str, Report]:
    """Hold gradients of the same weights against each other: two frameworks, or one's two ways of getting them.

    float64 within 1e-12, float32 within 16·depth·eps, relative to the whole tree.
    """
    reports = {}
    for dtype in ("float64", "float32"):
        unit = run.config.depth * EPS[dtype]
        limit = min(16.0, 1e-12 / unit) if dtype == "float64" else 16.0
        if len(backends) > 1:
            sides = {
                model.label: gradients(model, run, tokens, device, dtype, Reverse()) for model in backends.values()
            }
            names = "{} against {}".format(*sides)
        else:
            (model,) = backends.values()
            sides = {
                way: gradients(model, run, tokens, device, dtype, POLICIES[way]) for way in ("reversible", "store-all")
            }
            names = f"{model.label}, reversible against store-all"
        (left, a), (right, b) = sides.items()
        reports[f"{names}, {dtype}"] = compare(a, b, limit=limit, names=(left, right))
    return reports


def memory(
    backends: Backends, config: Config, tokens: np.ndarray, depths: tuple[int, ...] = DEPTHS
) -> dict[str, dict[str, list[int]]]:
    """Return the activation bytes of one gradient by framework and policy, one for each of ``depths``; on the CPU."""
    result: dict[str, dict[str, list[int]]] = {}
    for name, model in backends.items():
        result[name] = {policy: [] for policy in POLICIES}
        for depth in depths:
            deep = replace(config, depth=depth)
            weights = {f"weights.{key}": array for key, array in first_weights(deep).items()}
            for policy in POLICIES:
                net = model(deep, "cpu", "float32", POLICIES[policy])
                net.load(weights)
                result[name][policy].append(net.activation_bytes(tokens))
    return result


@dataclass(frozen=True)
class Agreement:
    """How far two frameworks' loss curves lie apart, at the most and at the end, in nats a byte."""

    largest: float
    last: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.largest <= self.tolerance  # a NaN is no agreement


def agreement(curves: list[list[float]], tolerance: float) -> Agreement:
    """Compare two loss curves, step by step.

    >>> agreement([[5.0, 4.0], [5.0, 4.5]], 0.25).ok
    False
    """
    a, b = (np.array(curve) for curve in curves)
    if a.shape != b.shape or not a.size:
        return Agreement(float("nan"), float("nan"), tolerance)
    difference = np.abs(a - b)
    return Agreement(float(difference.max()), float(difference[-1]), tolerance)
