"""revcore_torch: reversible networks in PyTorch. Activation memory does not grow with depth.

>>> import torch, revcore_torch
>>> model = revcore_torch.ReversibleSequential(*[torch.nn.Linear(8, 8) for _ in range(4)])
>>> model(torch.randn(2, 16)).shape
torch.Size([2, 16])
"""

from __future__ import annotations

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
