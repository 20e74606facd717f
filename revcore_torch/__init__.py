"""revcore_torch: reversible networks in PyTorch. Activation memory does not grow with depth.

>>> import torch, revcore_torch
>>> model = revcore_torch.ReversibleSequential(*[torch.nn.Linear(8, 8) for _ in range(4)])
>>> model(torch.randn(2, 16)).shape
torch.Size([2, 16])
"""

from __future__ import annotations

import importlib
from typing import Any

from revcore.policy import Checkpoint, MemoryBudget, Reverse, StoreAll
from revcore_torch.drift import DriftProbe
from revcore_torch.functional import inverse, reversible
from revcore_torch.modules import ReversibleSequential, check_inverse
from revcore_torch.neutral import from_neutral, to_neutral
from revcore_torch.planner import Plan, plan
from revcore_torch.replay import is_recomputing

__all__ = [
    "Checkpoint",
    "DriftProbe",
    "MemoryBudget",
    "Plan",
    "Reverse",
    "ReversibleSequential",
    "StoreAll",
    "check_inverse",
    "from_neutral",
    "inverse",
    "is_recomputing",
    "plan",
    "reversible",
    "to_neutral",
]

# The names of revlib: there for old code, in its own words, and not loaded before they are asked for.
_REVLIB = (
    "DUAL_OR_QUAD_TENSOR",
    "QUAD_TENSOR",
    "MemoryModes",
    "ReversibleModule",
    "ReversibleModuleCache",
    "TensorOffload",
    "additive_coupling_forward",
    "additive_coupling_inverse",
    "momentum_coupling_inverse",
    "offload_tensor",
    "replace_grad",
    "reverse_and_swap",
)
_REVLIB_MODULES = ("core", "revlib", "utils")


def __getattr__(name: str) -> Any:
    if name in _REVLIB_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _REVLIB:
        return getattr(importlib.import_module(f"{__name__}.revlib"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
