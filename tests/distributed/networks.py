"""One small transformer, reversible or written out by hand, and the run of one process that every engine must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from revcore_torch import ReversibleSequential
from tests.plain.pytorch import Plain

WIDTH, HEADS, VOCABULARY, TIME = 8, 2, 16, 6
STEPS = 3
CLIP = 0.02  # below every gradient's norm, and near AdamW's eps: it changes what a step does

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Attention(nn.Module):
    """Causal self-attention behind a LayerNorm: (batch, time, width) → the same."""

    def __init__(self, width: int = WIDTH, p: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.drop(self.out(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear layers behind a LayerNorm: (batch, time, width) → the same."""

    def __init__(self, width: int = WIDTH, p: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Transformer(nn.Module):
    """Tokens (batch, time) → logits (batch, time, vocabulary); the streams have ``width`` each.

    ``reversible=False`` writes the same network out by hand. ``tied`` gives the head the embedding's weight. Settings
    go to ``ReversibleSequential``.
    """

    def __init__(
        self, depth: int = 4, *, reversible: bool = True, p: float = 0.0, tied: bool = False, **settings: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        blocks = [(MLP if i % 2 else Attention)(p=p) for i in range(depth)]
        self.embedding = nn.Embedding(VOCABULARY, 2 * WIDTH)
        self.blocks = (
            ReversibleSequential(*blocks, split_dim=-1, **settings) if reversible else Plain(*blocks, split_dim=-1)
        )
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def with_lora(model: Any) -> Any:
    """Return the model with adapters of peft's beside some of its linear layers; all else is frozen."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["qkv", "up"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model).double()


def batches(rows: int = 4, steps: int = STEPS) -> list[Tensor]:
    """Return whole batches of tokens, (rows, time + 1) each: equal on every rank."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCABULARY, (rows, TIME + 1), generator=generator) for _ in range(steps)]


def part_of(batch: Tensor, rank: int, world: int) -> Tensor:
    """Return a rank's rows; the mean of the ranks' mean losses is the loss of the whole batch."""
    return batch.chunk(world)[rank]


def loss_of(model: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW whose ``eps`` is large enough that no step divides one rounding error by another."""
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)


def clipped(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW as trainers have it that clip gradients by their norm."""
    kept = [*parameters]
    optimizer = adamw(kept)

    def clip(*_: Any) -> None:
        assert clip_grad_norm_(kept, CLIP) > 2 * CLIP

    optimizer.register_step_pre_hook(clip)
    return optimizer


def train_alone(model: nn.Module, data: Sequence[Tensor], optimizer: Optimizer = adamw) -> list[float]:
    """Train on whole batches in this process alone; return the losses."""
    steps, losses = optimizer(p for p in model.parameters() if p.requires_grad), []
    for batch in data:
        steps.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        steps.step()
        losses.append(loss.item())
    return losses


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return ``‖a − b‖ / ‖b‖`` over two whole trees of one and the same names and shapes; NaN where anything is NaN."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    assert [t.shape for t in ours.values()] == [theirs[name].shape for name in ours]
    off = sum((t.double() - theirs[name].double()).pow(2).sum().item() for name, t in ours.items())
    size = sum(t.double().pow(2).sum().item() for t in theirs.values())
    assert size > 0, "there is nothing to compare"
    return (off / size) ** 0.5


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 1e-12) -> None:
    """Fail unless two whole trees are equal to ``tolerance``; NaN fails."""
    off = distance(ours, theirs)
    parts = [f"{name} by {(t - theirs[name]).abs().max():.3g}" for name, t in ours.items()]
    assert off <= tolerance, f"off by {off:.3g}: " + ", ".join(parts)
