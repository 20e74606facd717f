"""The names of revlib 1.0.1 and 1.7.2 over this engine: ``import revcore_torch as revlib`` runs old code.

New code needs none of them; ``docs/migration.md`` says which name of today each stands for, and what revlib got wrong.

- ``core``: modules for one step
- ``functions``: couplings, :class:`MemoryModes`, and what else is no module
- ``utils``: networks made of existing ``nn.Sequential`` and ``nn.ModuleList``
- ``options``, ``offload``, ``fused``: the keyword arguments ``memory_mode``, ``target_device`` and ``fused_optimizer``
- ``linked``: a tape over modules that are called one by one
- ``keys``: parameters by the names that revlib saved them under
"""

from __future__ import annotations

from revcore_torch.modules import ReversibleSequential
from revcore_torch.revlib.core import (
    DUAL_OR_QUAD_TENSOR,
    QUAD_TENSOR,
    MemoryModes,
    ReversibleModule,
    ReversibleModuleCache,
    TensorOffload,
    additive_coupling_forward,
    additive_coupling_inverse,
    momentum_coupling_inverse,
    offload_tensor,
    replace_grad,
    reverse_and_swap,
)

__all__ = [
    "DUAL_OR_QUAD_TENSOR",
    "QUAD_TENSOR",
    "MemoryModes",
    "ReversibleModule",
    "ReversibleModuleCache",
    "ReversibleSequential",
    "TensorOffload",
    "additive_coupling_forward",
    "additive_coupling_inverse",
    "momentum_coupling_inverse",
    "offload_tensor",
    "replace_grad",
    "reverse_and_swap",
]
