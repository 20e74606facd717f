"""The demo's language model in PyTorch: a byte-level transformer over two reversible streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revcore.demo.backend import Dtype
from revcore.demo.config import BETAS, DECAY, EPSILON, HEAD_SIZE, VOCABULARY, Config, decays
from revcore.errors import SpecError
from revcore.policy import Policy, Reverse
from revcore_torch.memory import LiveBytes
from revcore_torch.modules import ReversibleSequential
from revcore_torch.neutral import from_neutral, optimizer_from_neutral, optimizer_to_neutral, to_neutral


class Attention(nn.Module):
    """Causal self-attention behind a LayerNorm: (batch, time, width) → the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        # No bias: a key's has no gradient but rounding errors, which Adam would blow up to full steps.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = (-1, x.shape[-1] // HEAD_SIZE, HEAD_SIZE)
        q, k, v = (part.unflatten(-1, heads[1:]).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers behind a LayerNorm: (batch, time, width) → the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class LanguageModel(nn.Module):
    """Bytes (batch, time) → logits (batch, time, 256)."""

    def __init__(self, config: Config, policy: Policy = Reverse()) -> None:  # noqa: B008 - frozen
        super().__init__()
        width = config.width
        self.embedding = nn.Embedding(VOCABULARY, 2 * width)
        self.position = nn.Embedding(config.context, 2 * width)
        blocks = [(MLP if i % 2 else Attention)(width) for i in range(config.depth)]
        self.body = ReversibleSequential(*blocks, program=config.program, split_dim=-1, policy=policy)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.body(x)))


class Model:
    """:class:`revcore.demo.backend.Model` in PyTorch.

    >>> from revcore.demo.config import first_weights
    >>> config = Config(depth=2, width=16, context=8, batch=1)
    >>> model = Model(config, "cpu")
    >>> model.load({f"weights.{name}": array for name, array in first_weights(config).items()})
    >>> model.logits(np.zeros((1, 8), np.int32)).shape
    (1, 8, 256)
    """

    label: ClassVar[str] = "PyTorch"
    memory_method: ClassVar[str] = "peak of live tensor bytes"

    def __init__(
        self, config: Config, device: str, dtype: Dtype = "float32", policy: Policy = Reverse()  # noqa: B008 - frozen
    ) -> None:  # fmt: skip
        self._device = _device(device)
        self._net = LanguageModel(config, policy).to(self._device, getattr(torch, dtype))
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self._net.named_parameters():  # here its own names are the neutral ones
            groups[decays(name)].append(parameter)
        self._optimizer = torch.optim.AdamW(
            [{"params": groups[True], "weight_decay": DECAY}, {"params": groups[False], "weight_decay": 0.0}],
            lr=0.0,
            betas=BETAS,
            eps=EPSILON,
        )

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        prefix = "weights."
        from_neutral(self._net, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        moments = {k: v for k, v in state.items() if not k.startswith(prefix)}
        if moments:
            optimizer_from_neutral(self._net, self._optimizer, moments)

    def state(self) -> dict[str, np.ndarray]:
        weights = {f"weights.{name}": array for name, array in to_neutral(self._net).items()}
        return weights | optimizer_to_neutral(self._net, self._optimizer)

    def train_step(self, tokens: np.ndarray, rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        loss = self._loss(self._tensor(tokens))
        loss.backward()
        self._optimizer.step()
        return loss.item()

    @torch.no_grad()
    def loss(self, tokens: np.ndarray) -> float:
        return self._loss(self._tensor(tokens)).item()

    def gradients(self, tokens: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        self._net.zero_grad()
        loss = self._loss(self._tensor(tokens))
        loss.backward()
        return loss.item(), to_neutral(self._net, gradients=True)

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self._net(self._tensor(tokens)).float().cpu().numpy()

    def activation_bytes(self, tokens: np.ndarray) -> int:
        for parameter in self._net.parameters():  # so that they are there before, and do not count
            parameter.grad = torch.zeros_like(parameter)
        batch = self._tensor(tokens)
        with LiveBytes() as memory:
            self._loss(batch).backward()
        return memory.peak

    def _loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self._net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def _tensor(self, tokens: np.ndarray) -> Tensor:
        return torch.from_numpy(tokens.astype(np.int64)).to(self._device)


def _device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    if name != "gpu":
        raise SpecError(f"device came as {name!r}, expected 'cpu' or 'gpu'")
    if not torch.cuda.is_available():
        raise SpecError(
            f"device came as 'gpu', but PyTorch {torch.__version__} finds none here: write --device cpu, or install a "
            "build of torch for your GPU"
        )
    torch.backends.cuda.matmul.allow_tf32 = False  # parity is judged in true float32
    return torch.device("cuda")
