"""DeepSpeed's pipeline over a reversible network; needs ``deepspeed`` (``pip install "revcore-nn[deepspeed]"``).

Nothing here is needed for ZeRO: ``deepspeed.initialize(model=model, …)`` takes a reversible model as it is.

>>> import torch
>>> from revcore_torch import ReversibleSequential
>>> from revcore_torch.deepspeed import to_pipeline_layers
>>> blocks = ReversibleSequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
>>> len(to_pipeline_layers(torch.nn.Sequential(torch.nn.Linear(2, 8), blocks, torch.nn.Linear(8, 2))))
5
"""

from __future__ import annotations

from revcore_torch.deepspeed.checkpoint import load_pipeline_checkpoint
from revcore_torch.deepspeed.layers import to_pipeline_layers

__all__ = ["load_pipeline_checkpoint", "to_pipeline_layers"]
