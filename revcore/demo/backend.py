"""What the demo asks of a framework. ``revcore_torch.demo`` and ``revcore_jax.demo`` answer it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from revcore.demo.config import Config
from revcore.errors import SpecError
from revcore.policy import Policy

Dtype = Literal["float32", "float64"]
Tensors = dict[str, np.ndarray]


class Model(Protocol):
    """The demo's language model and its optimizer in one framework. Arrays go in and out as NumPy's.

    ``tokens`` is (batch, context + 1): the inputs and, shifted by one, the targets. Names and layouts are the neutral
    ones of :mod:`revcore.weights`. A model just made holds no weights: :meth:`load` fills it.
    """

    label: ClassVar[str]
    """What the framework is called."""
    memory_method: ClassVar[str]
    """How :meth:`activation_bytes` measures."""

    def __init__(self, config: Config, device: str, dtype: Dtype = ..., policy: Policy = ...) -> None: ...

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Fill the weights (``weights.NAME``) and, where they are given, Adam's ``step``, ``first.…``, ``second.…``."""
        ...

    def state(self) -> Tensors:
        """Return what :meth:`load` takes."""
        ...

    def train_step(self, tokens: np.ndarray, rate: float) -> float:
        """Train on one batch, and return its loss before that."""
        ...

    def loss(self, tokens: np.ndarray) -> float:
        """Return the mean cross-entropy in nats a byte."""
        ...

    def gradients(self, tokens: np.ndarray) -> tuple[float, Tensors]:
        """Return the loss and its gradients by the parameters' neutral names."""
        ...

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return the logits (batch, context, 256) of inputs (batch, context)."""
        ...

    def activation_bytes(self, tokens: np.ndarray) -> int:
        """Return the bytes that one gradient takes at its peak, beyond weights, gradients and tokens."""
        ...


def require(package: str, extras: str, purpose: str) -> None:
    """Say what to install, unless ``package`` is there."""
    if importlib.util.find_spec(package) is None:
        raise SpecError(f"{package} is not installed, which {purpose} needs: pip install 'revcore-nn[{extras}]'")


def load_backend(name: str) -> type[Model]:
    """Return the ``Model`` of a framework, imported by its name only now.

    Raises:
        SpecError: no such framework, or one that is not installed.

    >>> load_backend("tensorflow")
    Traceback (most recent call last):
    ...
    revcore.SpecError: backend came as 'tensorflow', expected 'torch' or 'jax'
    """
    needs = {"torch": ("torch",), "jax": ("jax", "optax")}
    if name not in needs:
        raise SpecError(f"backend came as {name!r}, expected 'torch' or 'jax'")
    for package in needs[name]:
        require(package, f"{name},demo", f"backend {name!r}")
    module: Any = importlib.import_module(f"revcore_{name}.demo")
    return module.Model
