"""How far a reversible model is from the ordinary one that it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revcore.errors import SpecError
from revcore_torch.hf.convert import plain, stacks


@dataclass(frozen=True)
class Distance:
    """What :func:`compare` found.

    Attributes:
        output: which output was compared.
        relative: ``‖reversible − ordinary‖ / ‖ordinary‖`` over the whole output.
        cosine: of the output's last dimension, the mean.
        agreement: the share of positions with the same largest element (for logits: the same next token).

    >>> print(Distance("logits", relative=0.25, cosine=0.97, agreement=0.9))
    logits: relative distance 0.25, cosine 0.9700, same largest element in 90.0%
    """

    output: str
    relative: float
    cosine: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"{self.output}: relative distance {self.relative:.3g}, cosine {self.cosine:.4f}, same largest element in "
            f"{self.agreement:.1%}"
        )


@torch.no_grad()
def compare(model: nn.Module, *args: Any, **kwargs: Any) -> Distance:
    """Run a reversible model and the ordinary one on the same input, and say how far apart they are.

    Args:
        model: what :func:`make_reversible` returned; it runs in ``eval()`` mode, twice.
        *args: what the model is called with, as ``**kwargs``.

    Raises:
        SpecError: the model has no reversible layers, or returns neither ``logits`` nor ``last_hidden_state``.

    >>> import transformers
    >>> from revcore_torch.hf import make_reversible
    >>> config = transformers.BertConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=2)
    >>> model = make_reversible(transformers.BertModel(config), "momentum", beta=1e-6)
    >>> compare(model, torch.ones(1, 4, dtype=torch.long)).cosine
    1.0
    """
    if not stacks(model):
        raise SpecError("the model has no reversible layers: call make_reversible(model, …) first")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        name, reversible = _main_output(model(*args, **kwargs))
        with plain(model):
            _, ordinary = _main_output(model(*args, **kwargs))
    finally:
        for module in training:
            module.training = True
    a, b = reversible.double(), ordinary.double()
    return Distance(
        name,
        float((a - b).norm() / b.norm()),
        float(torch.cosine_similarity(a, b, dim=-1).mean()),
        float((a.argmax(-1) == b.argmax(-1)).double().mean()),
    )


def _main_output(output: Any) -> tuple[str, Tensor]:
    for name in ("logits", "last_hidden_state"):
        if isinstance(value := getattr(output, name, None), Tensor):
            return name, value
    raise SpecError(f"the model returned {type(output).__name__} with neither logits nor last_hidden_state")
