"""Tiny models of each family, their inputs, and their reversible form written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, HIDDEN = 40, 16, 2, 24
_BODY: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": HIDDEN}
_TEXT: dict[str, Any] = {**_BODY, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
_DECODER: dict[str, Any] = {**_TEXT, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}


def _gpt2(depth: int) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=depth, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCABULARY, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def _llama(depth: int) -> nn.Module:
    config = transformers.LlamaConfig(num_hidden_layers=depth, attention_dropout=0.1, **_DECODER)
    return transformers.LlamaForCausalLM(config)


def _mistral(depth: int) -> nn.Module:
    config = transformers.MistralConfig(num_hidden_layers=depth, sliding_window=4, attention_dropout=0.1, **_DECODER)
    return transformers.MistralForCausalLM(config)


def _qwen(depth: int) -> nn.Module:
    config = transformers.Qwen3Config(num_hidden_layers=depth, head_dim=8, attention_dropout=0.1, **_DECODER)
    return transformers.Qwen3ForCausalLM(config)


def _gpt_neox(depth: int) -> nn.Module:
    config = transformers.GPTNeoXConfig(
        num_hidden_layers=depth, hidden_dropout=0.2, attention_dropout=0.1, bos_token_id=1, eos_token_id=2, **_TEXT
    )
    return transformers.GPTNeoXForCausalLM(config)


def _bert(depth: int) -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=depth, **_TEXT, **_DROPOUT))


def _roberta(depth: int) -> nn.Module:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(num_hidden_layers=depth, **_TEXT, **_DROPOUT))


def _vit(depth: int) -> nn.Module:
    config = transformers.ViTConfig(num_hidden_layers=depth, image_size=8, patch_size=4, **_BODY, **_DROPOUT)
    return transformers.ViTForImageClassification(config)


def _t5(depth: int) -> nn.Module:
    config: Any = transformers.T5Config(
        d_model=WIDTH,
        d_kv=8,
        d_ff=HIDDEN,
        num_layers=depth,
        num_decoder_layers=depth,
        num_heads=HEADS,
        vocab_size=VOCABULARY,
        dropout_rate=0.2,
        pad_token_id=0,
    )
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[int], nn.Module]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen": _qwen,
    "gpt_neox": _gpt_neox,
    "bert": _bert,
    "roberta": _roberta,
    "vit": _vit,
    "t5": _t5,
}
GENERATORS = ("gpt2", "llama", "mistral", "qwen", "gpt_neox", "t5")


def make(family: str, depth: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    """Return a model in training mode, with weights large enough for every layer to matter."""
    torch.manual_seed(0)
    model = FAMILIES[family](depth)
    if dtype == torch.float64:
        _widen_norms(model)
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and family != "t5":  # whose first weights are large already
                parameter.mul_(4)
    return model.train()


def _widen_norms(model: nn.Module) -> None:
    """Replace norms that compute in float32 whatever they are given: one rounding there is 1e-8 of a gradient."""
    for module in [*model.modules()]:
        children: list[tuple[str, Any]] = [*module.named_children()]
        for name, child in children:
            if hasattr(child, "variance_epsilon") and not hasattr(child, "bias"):
                setattr(module, name, nn.RMSNorm(child.weight.shape, child.variance_epsilon))


def inputs(family: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Return a batch of two; the second sentence is shorter than the first."""
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        images = torch.randn(2, 3, 8, 8, generator=generator, dtype=dtype)
        return {"pixel_values": images, "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def by_hand(layers: Any, kind: str, number: float) -> None:
    """Make layers reversible in plain PyTorch: what ``make_reversible`` must equal."""
    streams: list[Tensor] = []

    def called(i: int, layer: Any) -> Callable[..., Any]:
        plain = layer.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if i == 0:
                streams[:] = [torch.zeros_like(x)] if kind == "momentum" else [x]
            kwargs = {k: None if isinstance(v, transformers.Cache) else v for k, v in kwargs.items()}
            args = tuple(None if isinstance(a, transformers.Cache) else a for a in args)
            out = plain(x, *args, **kwargs)
            f = (out[0] if isinstance(out, tuple) else out) - x
            old = streams[0]
            if kind == "momentum":
                streams[0] = number * old + (1 - number) * f
                new = x + streams[0]
            else:
                scale = (1 if i == 0 else 2) * number if kind == "leapfrog" else 1.0
                streams[0], new = x, old + scale * f
                if kind == "revnet" and i == len(layers) - 1:
                    new = (x + new) / 2
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return forward

    for i, layer in enumerate(layers):
        layer.forward = called(i, layer)
