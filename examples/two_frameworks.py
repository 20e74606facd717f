"""One network in PyTorch and in JAX, and whether they agree:

    python -m revcore parity examples.two_frameworks:torch_model examples.two_frameworks:jax_model --shape 2,16

The coupling is written once, for both. ``mistaken`` has what ports often get wrong, a norm's epsilon, in one block.
"""

from __future__ import annotations

from typing import Any

from revcore import Coupling
from revcore.policy import Reverse

DEPTH, WIDTH = 8, 8


def _forward(x: Any, f: Any) -> Any:
    return 0.8 * x + f


def _inverse(y: Any, f: Any) -> Any:
    return (y - f) / 0.8


COUPLING = Coupling.from_functions(_forward, _inverse)


def torch_model() -> Any:
    """Return the network in PyTorch, in float32, with weights of its own."""
    import torch
    from torch import nn

    from revcore_torch import ReversibleSequential

    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(DEPTH)]
    return ReversibleSequential(*blocks, coupling=COUPLING, policy=Reverse())


def jax_model(epsilons: Any = (1e-5,) * DEPTH) -> Any:
    """Return the same network in Flax NNX. Its defaults differ: epsilon, the fast variance, the approximate GELU."""
    import jax
    from flax import nnx

    from revcore_jax.nnx import ReversibleSequential

    def gelu(x: Any) -> Any:
        return jax.nn.gelu(x, approximate=False)

    rngs = nnx.Rngs(0)
    blocks = [
        nnx.Sequential(
            nnx.LayerNorm(WIDTH, epsilon=epsilon, use_fast_variance=False, rngs=rngs),
            nnx.Linear(WIDTH, WIDTH, rngs=rngs),
            gelu,
        )
        for epsilon in epsilons
    ]
    return ReversibleSequential(*blocks, coupling=COUPLING, policy=Reverse())


def mistaken() -> Any:
    """Return the network in JAX with Flax's own epsilon in block 3."""
    return jax_model([1e-6 if i == 3 else 1e-5 for i in range(DEPTH)])
