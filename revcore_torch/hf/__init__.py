"""Hugging Face models made reversible, in place; needs ``transformers`` ≥ 5.20 (``pip install "revcore-nn[hf]"``).

>>> import torch, transformers
>>> from revcore_torch.hf import make_reversible
>>> config = transformers.GPT2Config(n_layer=4, n_embd=32, n_head=2, vocab_size=50, n_positions=16)
>>> model = make_reversible(transformers.GPT2LMHeadModel(config), "momentum", beta=0.9).train()
>>> ids = torch.arange(10)[None]
>>> model(input_ids=ids, labels=ids).loss.backward()
"""

from __future__ import annotations

from revcore_torch.hf.compare import Distance, compare
from revcore_torch.hf.convert import make_plain, make_reversible, plain, stacks
from revcore_torch.hf.patch import Stack

__all__ = ["Distance", "Stack", "compare", "make_plain", "make_reversible", "plain", "stacks"]
