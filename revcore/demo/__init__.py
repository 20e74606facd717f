"""The demo: one reversible language model, trained in PyTorch and in JAX from the same weights on the same batches.

This folder holds all that no framework has a part in; ``revcore_torch.demo`` and ``revcore_jax.demo`` hold the model.

>>> Config(depth=24).program.num_blocks
24
"""

from __future__ import annotations

from revcore.demo.config import Config
from revcore.demo.run import demo

__all__ = ["Config", "demo"]
