"""revcore: reversible networks, specified once for every framework.

This package holds plain data and arithmetic: couplings, steps, programs, policies. It imports neither NumPy, torch
nor jax; ``revcore_torch`` and ``revcore_jax`` run what it specifies, and ``revcore.reference`` (NumPy) is the oracle
that both are held against.

>>> import revcore
>>> program = revcore.revnet(depth=4, coupling=revcore.Momentum(0.9))
>>> program.num_blocks
4
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from revcore.coupling import BDIA, Additive, Affine, Coupling, LinearCoupling, Momentum
from revcore.drift import DriftReport, DriftWarning, amplification
from revcore.errors import InversionError, SpecError
from revcore.exact import Exact
from revcore.policy import Checkpoint, MemoryBudget, Policy, Reverse, StoreAll
from revcore.program import Program, bdia, grouped, leapfrog, momentum_net, reversible_columns, revnet
from revcore.step import Anchor, Bijection, Chain, Couple, Repeat, Step

if TYPE_CHECKING:
    from revcore import parity as parity
    from revcore import reference as reference
    from revcore import weights as weights
    from revcore.laws import CouplingReport as CouplingReport
    from revcore.laws import InverseReport as InverseReport
    from revcore.laws import check_coupling as check_coupling

__version__ = "0.1.0"
__all__ = [
    "BDIA",
    "Additive",
    "Affine",
    "Anchor",
    "Bijection",
    "Chain",
    "Checkpoint",
    "Couple",
    "Coupling",
    "CouplingReport",
    "DriftReport",
    "DriftWarning",
    "Exact",
    "InverseReport",
    "InversionError",
    "LinearCoupling",
    "MemoryBudget",
    "Momentum",
    "Policy",
    "Program",
    "Repeat",
    "Reverse",
    "SpecError",
    "Step",
    "StoreAll",
    "amplification",
    "bdia",
    "check_coupling",
    "grouped",
    "leapfrog",
    "momentum_net",
    "parity",
    "reference",
    "reversible_columns",
    "revnet",
    "weights",
]


# These need NumPy, which `import revcore` does not load.
_LAZY = {
    "CouplingReport": "revcore.laws",
    "InverseReport": "revcore.laws",
    "check_coupling": "revcore.laws",
    "parity": "revcore.parity",
    "reference": "revcore.reference",
    "weights": "revcore.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'revcore' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if module.__name__ == f"revcore.{name}" else getattr(module, name)
