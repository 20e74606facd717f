"""What the demo trains: its sizes, its program, its first weights and its learning rate, as numbers alone."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from revcore.errors import SpecError
from revcore.program import Program
from revcore.step import Chain, Couple, Repeat

VOCABULARY = 256
"""A token is a byte."""
HEAD_SIZE = 16
"""Features of one attention head."""
BETAS, EPSILON, DECAY = (0.9, 0.98), 1e-8, 0.1
"""AdamW's, in every framework."""


@dataclass(frozen=True)
class Config:
    """The network and its training; equal configs train on equal batches from equal weights.

    Args:
        depth: how many coupled steps, attention and MLP in turn; even.
        steps: how many training steps; the learning rate falls towards the last.
        seed: of the first weights and the batches.
        width: features of each of the two streams; a multiple of 16.
        context: how many bytes the network sees.
        batch: how many sequences a step trains on.
        rate: the highest learning rate.

    Raises:
        SpecError: a number out of its range.

    >>> Config(depth=7)
    Traceback (most recent call last):
    ...
    revcore.SpecError: depth came as 7, but must be an even number of at least 2 (attention and MLP in turn): write \
--depth 8
    """

    depth: int = 24
    steps: int = 500
    seed: int = 0
    width: int = 64
    context: int = 64
    batch: int = 16
    rate: float = 5e-3

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("seed", 0), ("width", HEAD_SIZE), ("context", 2), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SpecError(f"{name} came as {value!r}, but must be a whole number of at least {least}")
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 2 or self.depth % 2:
            near = max(2, self.depth + 1) if isinstance(self.depth, int) else 24
            raise SpecError(
                f"depth came as {self.depth!r}, but must be an even number of at least 2 (attention and MLP in turn): "
                f"write --depth {near}"
            )
        if self.width % HEAD_SIZE:
            raise SpecError(
                f"width came as {self.width}, but must be a multiple of {HEAD_SIZE} (the size of an attention head): "
                f"write --width {self.width + -self.width % HEAD_SIZE}"
            )
        if not isinstance(self.rate, float) or not 0 < self.rate < 1:
            raise SpecError(f"rate came as {self.rate!r}, but must be a number between 0 and 1")

    @property
    def program(self) -> Program:
        """The one specification that both frameworks run.

        >>> Config(depth=24).program.num_blocks, Config(depth=24).program.num_slots
        (24, 2)
        """
        return Program((Repeat(Chain((Couple(0, (1,)), Couple(1, (0,)))), self.depth // 2),))

    def rate_at(self, step: int) -> float:
        """Return the learning rate of step ``step``: a warm-up, then a cosine down to a tenth.

        >>> [round(Config(steps=100).rate_at(step), 4) for step in (0, 10, 100)]
        [0.0005, 0.0049, 0.0005]
        """
        warm = min(1.0, (step + 1) / max(1, min(20, self.steps // 10)))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return self.rate * warm * (0.1 + 0.9 * cosine)

    def to_json(self) -> str:
        """Return the config as a line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Config:
        """Return the config that :meth:`to_json` wrote.

        Raises:
            SpecError: it is none.

        >>> Config.from_json(Config(depth=8).to_json()) == Config(depth=8)
        True
        """
        try:
            data: Any = json.loads(text)
            return Config(**data)
        except (ValueError, TypeError) as error:
            raise SpecError(f"the config came as {text!r}, expected what Config.to_json() wrote: {error}") from error


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the parameters' names and shapes in the neutral form: what every framework's model is filled from.

    >>> shapes(Config(depth=2, width=16))["body.0.qkv.weight"]
    (48, 16)
    """
    width, both = config.width, 2 * config.width
    result: dict[str, tuple[int, ...]] = {
        "embedding.weight": (VOCABULARY, both),
        "position.weight": (config.context, both),
    }
    attention = {"qkv.weight": (3 * width, width), "out.weight": (width, width), "out.bias": (width,)}
    mlp = {
        "up.weight": (4 * width, width),
        "up.bias": (4 * width,),
        "down.weight": (width, 4 * width),
        "down.bias": (width,),
    }
    for i in range(config.depth):
        for name, shape in {"norm.weight": (width,), "norm.bias": (width,), **(mlp if i % 2 else attention)}.items():
            result[f"body.{i}.{name}"] = shape
    return result | {"norm.weight": (both,), "norm.bias": (both,), "head.weight": (VOCABULARY, both)}


def first_weights(config: Config) -> dict[str, np.ndarray]:
    """Return the weights that training starts from, made of ``config.seed`` once for all frameworks.

    >>> weights = first_weights(Config(depth=2))
    >>> float(weights["body.1.norm.weight"].sum()), str(weights["head.weight"].dtype)
    (64.0, 'float32')
    """
    random = np.random.default_rng(config.seed)
    result = {}
    for name, shape in shapes(config).items():
        layer, _, kind = name.rpartition(".")
        if len(shape) == 1:
            array = np.full(shape, float(layer.endswith("norm") and kind == "weight"))
        else:
            scale = 0.2 if layer in ("embedding", "position") else shape[1] ** -0.5
            if layer.endswith(("out", "down")):  # so that the streams keep their size at any depth
                scale *= config.depth**-0.5
            elif layer == "head":  # so that all bytes are about equally likely at first
                scale *= 0.3
            array = random.normal(0.0, scale, shape)
        result[name] = array.astype(np.float32)
    return result


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter: to the blocks' matrices.

    >>> decays("body.0.qkv.weight"), decays("body.0.norm.weight"), decays("embedding.weight")
    (True, False, False)
    """
    return name.startswith("body.") and name.endswith(".weight") and ".norm." not in name
