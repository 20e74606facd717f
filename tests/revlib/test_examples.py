"""The examples that revlib published, under ``import revcore_torch as revlib``: smaller, and on the CPU.

Every call of the library is the one that was printed. What was asserted there of a GPU's memory is counted here in
bytes of tensors; and every gradient is held against the same network in PyTorch alone, in float64.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpoint_fn

import revcore_torch as revlib
from revcore import SpecError
from revcore_torch.memory import LiveBytes
from revcore_torch.revlib import offload
from tests.plain.pytorch import Plain
from tests.revlib.comparison import assert_like_plain

BETA = 0.99


def momentum_coupling_forward(other_stream: Tensor, fn_out: Tensor) -> Tensor:
    return other_stream * BETA + fn_out * (1 - BETA)


def momentum_coupling_inverse(output: Tensor, fn_out: Tensor) -> Tensor:
    return (output - fn_out * (1 - BETA)) / BETA


def conv(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, (3, 3), padding=1)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# --- 1.0.1 ------------------------------------------------------------------------------------------------------------


def irevnet_block(channels: int, multiplier: int, norm: int | None = None) -> nn.Module:
    def block_conv(in_channels: int, out_channels: int) -> nn.Module:
        return nn.Sequential(
            conv(in_channels, out_channels), nn.Dropout(0.2), nn.BatchNorm2d(norm or out_channels), nn.ReLU()
        )

    return nn.Sequential(
        block_conv(channels, channels * multiplier),
        block_conv(channels * multiplier, channels),
        conv(channels, channels),
    )


def test_101_irevnet() -> None:
    """1.0.1's i-RevNet. As printed, its BatchNorm has the channels of the wrong side, and no library can run it."""
    channels, multiplier, depth, classes = 4, 2, 4, 5

    def model(norm: int | None) -> nn.Sequential:
        rev_model = revlib.ReversibleSequential(*[irevnet_block(channels, multiplier, norm) for _ in range(depth)])
        first, last = nn.Conv2d(3, 2 * channels, (3, 3)), nn.Conv2d(2 * channels, classes, (3, 3))
        return nn.Sequential(first, rev_model, last).double()

    with pytest.raises(RuntimeError, match="running_mean"):
        model(norm=channels)(double(2, 3, 10, 10))
    net = model(norm=None)
    assert net(double(2, 3, 10, 10)).size() == (2, classes, 6, 6)  # as printed, 224 was to stay 224 without padding
    first, middle, last = copy.deepcopy([*net])
    plain = nn.Sequential(first, Plain(*middle.children()), last)
    assert_like_plain(net, plain, double(2, 3, 10, 10), depth + 2, limit=64)


def test_101_momentum_net() -> None:
    """1.0.1's MomentumNet. As printed, its inverse is none (it divides too late), and gradients were wrong silently."""
    channels, depth = 4, 8
    blocks = [conv(channels, channels).double() for _ in range(depth)]

    def printed_inverse(output: Tensor, fn_out: Tensor) -> Tensor:
        return output / BETA - fn_out * (1 - BETA)

    with pytest.raises(SpecError, match=r"whose inverse is x = \(y - 0\.01·f\) / 0\.99"):
        revlib.ReversibleSequential(
            *blocks, coupling_forward=momentum_coupling_forward, coupling_inverse=printed_inverse
        )
    rev_model = revlib.ReversibleSequential(
        *blocks, coupling_forward=momentum_coupling_forward, coupling_inverse=momentum_coupling_inverse
    )
    inp = double(2, channels * 2, 6, 6)
    assert rev_model(inp).size() == inp.size()
    assert_like_plain(rev_model, Plain(*copy.deepcopy(blocks), update=momentum_coupling_forward), inp, depth)


class Reformer(nn.Module):
    """As both versions printed it, word for word."""

    def __init__(
        self,
        make: Any,
        sequence_length: int,
        features: int,
        depth: int,
        heads: int,
        bucket_size: int = 64,
        lsh_hash_count: int = 8,
        ff_chunks: int = 16,
        input_classes: int = 256,
        output_classes: int = 256,
    ) -> None:
        super().__init__()
        parts = pytest.importorskip("reformer_pytorch.reformer_pytorch", reason="the bench extra's")
        self.token_embd = nn.Embedding(input_classes, features * 2)
        self.pos_embd = parts.AbsolutePositionalEmbedding(features * 2, sequence_length)
        self.core = make(
            *[
                nn.Sequential(nn.LayerNorm(features), layer)
                for _ in range(depth)
                for layer in [
                    parts.LSHSelfAttention(features, heads, bucket_size, lsh_hash_count),
                    parts.Chunk(ff_chunks, parts.FeedForward(features, activation=nn.GELU), along_dim=-2),
                ]
            ],
            split_dim=-1,
        )
        self.out_norm = nn.LayerNorm(features * 2)
        self.out_linear = nn.Linear(features * 2, output_classes)

    def forward(self, inp: Tensor) -> Tensor:
        return self.out_linear(self.out_norm(self.core(self.token_embd(inp) + self.pos_embd(inp))))


def test_reformer() -> None:
    """The Reformer of 1.0.1 and of 1.7.2: LSH attention draws its rotations anew, and has to draw them again."""
    sequence, classes = 32, 16
    sizes: dict[str, Any] = {"bucket_size": 8, "lsh_hash_count": 2, "ff_chunks": 4, "output_classes": classes}
    model = Reformer(revlib.ReversibleSequential, sequence, 8, 2, 2, **sizes).double()
    assert model(torch.ones((2, sequence), dtype=torch.long)).size() == (2, sequence, classes)
    plain = Reformer(lambda *blocks, split_dim: Plain(*blocks, split_dim=split_dim), sequence, 8, 2, 2, **sizes)
    plain.double().load_state_dict(model.state_dict())
    assert_like_plain(model, plain, torch.randint(256, (2, sequence)), 6, limit=64)


# --- 1.7.2 ------------------------------------------------------------------------------------------------------------


def test_172_reversible_backward() -> None:
    """1.7.2's "Reversible Backward": a plain network keeps most, a checkpointed one less, a reversible one least."""
    batch_size = 512

    def networks(depth: int) -> tuple[nn.Module, nn.Module]:
        base = [
            nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
        ] * depth  # one block, with its weights, at each step
        return nn.Sequential(*base), revlib.ReversibleSequential(*base)

    def memory_utilization(mod: nn.Module, checkpoint: bool = False, features: int = 1) -> int:
        with LiveBytes() as memory:
            inp = torch.randn(batch_size, features, requires_grad=True)
            if not checkpoint:
                out: Any = mod(inp)
            else:
                out = inp
                for layer in mod.children() if len([*mod.children()]) > 1 else [mod] * depth:
                    out = checkpoint_fn(layer, out, use_reentrant=False)
            return memory.live

    depth = 16
    baseline, revnet = networks(depth)
    assert memory_utilization(baseline) > memory_utilization(baseline, True) > memory_utilization(revnet, features=2)
    # the input, the output and the two streams that it is made of; at any depth
    assert memory_utilization(revnet, features=2) == 3 * (2 * batch_size * 4)
    assert memory_utilization(networks(64)[1], features=2) == 3 * (2 * batch_size * 4)
    revnet = revnet.double()
    plain = Plain(*[copy.deepcopy(next(revnet.children()))] * depth)
    assert_like_plain(revnet, plain, double(8, 2), depth)


def test_172_parameter_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.7.2's "Parameter Offload": after the forward pass the device holds two streams, and no parameter.

    The other device is the CPU once more: what is moved there is copied, and counted.
    """
    monkeypatch.setattr(offload, "_move", lambda tensor, device: tensor.clone())
    depth, width, batch_size = 8, 16, 1
    base = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    block = width * width * 4

    def memory_utilization(offload: bool) -> tuple[int, int]:
        with LiveBytes() as memory:
            mod = copy.deepcopy(revlib.ReversibleSequential(*base, target_device="cpu" * offload))
            if not offload:
                mod = copy.deepcopy(mod)  # in the place of .cuda()
            there = memory.live if offload else 0
            inp = torch.randn(batch_size, width * 2)
            _unused = mod(inp.requires_grad_())
            return memory.live - there, memory.peak - there

    (without, _), (with_offload, peak) = memory_utilization(False), memory_utilization(True)
    assert without > with_offload == 3 * (batch_size * 2 * width * 4)  # input, output, streams
    assert block <= peak - with_offload < 2 * block  # one block's parameters at a time


def test_172_coupling() -> None:
    """1.7.2's "Coupling": lists of couplings. Gradients of couplings other than the additive one were wrong."""
    channels, depth = 4, 3
    layers = [layer for _ in range(depth) for layer in [conv(channels, channels), nn.Identity()]]
    rev_model = revlib.ReversibleSequential(
        *layers,
        coupling_forward=[momentum_coupling_forward, revlib.additive_coupling_forward],
        coupling_inverse=[momentum_coupling_inverse, revlib.additive_coupling_inverse],
    ).double()
    inp = double(2, channels * 2, 6, 6)
    assert rev_model(inp).size() == inp.size()
    plain = Plain(*copy.deepcopy([*rev_model]), update=(momentum_coupling_forward, torch.add))
    assert_like_plain(rev_model, plain, inp, 2 * depth)


def test_172_irevnet() -> None:
    """1.7.2's i-RevNet. BatchNorm's statistics moved twice in a training step, and now once."""
    channels, channel_multiplier, depth, classes = 4, 2, 3, 5
    rev_model = revlib.ReversibleSequential(*[irevnet_block(channels, channel_multiplier) for _ in range(depth)])
    model = nn.Sequential(conv(3, 2 * channels), rev_model, conv(2 * channels, classes)).double()
    twin = copy.deepcopy(model)
    out = model(double(1, 3, 8, 8))
    out.mean().backward()
    assert out.size() == (1, classes, 8, 8)
    assert {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1}  # type: ignore[arg-type]
    first, middle, last = copy.deepcopy([*twin])
    plain = nn.Sequential(first, Plain(*middle.children()), last)
    assert_like_plain(twin, plain, double(2, 3, 8, 8), depth + 2, limit=64)


def test_172_merged_optimizer() -> None:
    """1.7.2's "Merged Optimizer": the same losses bit for bit, and one block's gradients instead of all."""
    size, depth, batch_size, steps = 16, 8, 1, 4

    def optim(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=1e-3)

    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))

    def run(fused: bool) -> tuple[list[float], int]:
        torch.manual_seed(42069)
        model = revlib.ReversibleSequential(*[block() for _ in range(depth)], fused_optimizer=optim if fused else None)
        optimizer = None if fused else optim(model.parameters())
        losses = []
        with LiveBytes() as memory:
            for _ in range(steps):
                inp = torch.randn((batch_size, size * 2), requires_grad=True)
                loss = (model(inp) - inp).abs().mean()
                loss.backward()
                if optimizer is not None:
                    optimizer.step()
                    model.zero_grad(set_to_none=True)
                losses.append(loss.item())
        return losses, memory.peak

    (losses, peak), (plain_losses, plain_peak) = run(True), run(False)
    assert losses == plain_losses
    of_a_block = sum(p.numel() for p in block().parameters()) * 4
    assert plain_peak - peak > (depth - 2) * of_a_block


def test_172_hugging_face() -> None:
    """1.7.2's "HuggingFace Integration", on a GPT-Neo of random weights.

    As printed, a small β leaves the model as it was, which was not so: one stream began at 0. The 150 GB against 6 GB
    of the printed run are bytes of tensors here, the same at any depth.
    """
    transformers = pytest.importorskip("transformers", reason="the hf extra's")
    from revcore_torch.utils import module_list_to_momentum_net

    def gpt(layers: int) -> Any:
        torch.manual_seed(0)
        config = transformers.GPTNeoConfig(
            vocab_size=64,
            hidden_size=16,
            num_layers=layers,
            num_heads=2,
            attention_types=[[["global", "local"], layers // 2]],
            max_position_embeddings=32,
            window_size=8,
            use_cache=False,
        )
        return transformers.AutoModelForCausalLM.from_config(config).double().eval()

    tokens = torch.randint(64, (2, 12))
    model = gpt(4)
    original_layers = model.transformer.h
    logits = model(tokens)[0].detach()
    errors = []
    for beta in (1e-1, 1e-3):
        model.transformer.h = module_list_to_momentum_net(original_layers, residual=True, beta=beta)
        errors.append(((model(tokens)[0].detach() - logits).norm() / logits.norm()).item())
    assert errors[0] < 0.2
    assert errors[1] < 2e-2 * errors[0]
    text = model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.transformer.h = original_layers
    assert text.tolist() == model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()

    def gradients(model: Any) -> list[Tensor]:
        model(tokens)[0].square().mean().backward()
        return [p.grad for p in model.parameters()]

    model.transformer.h = module_list_to_momentum_net(original_layers, residual=True, beta=0.5)
    plain = copy.deepcopy(model)
    plain.transformer.h = module_list_to_momentum_net(
        copy.deepcopy(original_layers), residual=True, beta=0.5, memory_mode=revlib.MemoryModes.no_savings
    )
    for got, expected in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)

    def held(layers: int, change: bool) -> int:
        model = gpt(layers)
        if change:
            model.transformer.h = module_list_to_momentum_net(model.transformer.h, residual=True, beta=0.5)
        with LiveBytes() as memory:
            _unused = model(tokens)[0]
            return memory.live

    assert held(8, True) == held(4, True) < held(4, False) < held(8, False)


def test_172_cast_intermediates() -> None:
    """1.7.2's "Cast Intermediates": half of the memory, the same output, a gradient in half precision."""
    from revcore_torch.utils import memory_efficient_intermediates

    items, iterations = 2**10, 8

    def run() -> tuple[float, int, Tensor]:
        torch.manual_seed(0)
        with LiveBytes() as memory:
            out = a = torch.randn((items,), dtype=torch.float32, requires_grad=True)
            for _ in range(iterations):
                out = out * torch.randn_like(out)
            held = memory.live
        out.mean().backward()
        assert a.grad is not None
        return out.mean().item(), held, a.grad

    output, held, grad = run()
    with memory_efficient_intermediates(torch.half):
        cast_output, cast_held, cast_grad = run()
    assert output == cast_output
    whole = items * 4
    assert held == (2 + iterations) * whole  # `a`, `out`, and each factor
    assert cast_held == 2 * whole + iterations * whole // 2
    error = float((cast_grad - grad).norm() / grad.norm())
    assert 0 < error < iterations * torch.finfo(torch.half).eps


def test_172_offload_intermediates() -> None:
    """1.7.2's "Offload Intermediates": the same numbers, with what is saved on another device."""
    from revcore_torch.utils import memory_efficient_intermediates

    a, b = double(4).requires_grad_(), double(4)
    with memory_efficient_intermediates(storage_device="cpu"):
        out = (a * b).exp()
    out.sum().backward()
    torch.testing.assert_close(a.grad, b * (a * b).exp(), rtol=0, atol=0)
    with memory_efficient_intermediates(storage_device="cpu"):
        out = (a * b).exp()
    out.add_(1)
    with pytest.raises(RuntimeError, match="changed in place after it was saved"):
        out.sum().backward()
    with memory_efficient_intermediates(storage_device="meta"):  # it does go there: the data is gone
        out = (a * b).exp()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        out.sum().backward()
