"""The Flax examples of Hugging Face models: loss, gradients and weights are those of the reversible torch model."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from transformers import BertConfig, LlamaConfig, ViTConfig
from typer.testing import CliRunner

from examples import flax_decoder, flax_vit
from examples.flax_hf import Port, compare, folded, loss_of, renamed, to_flax, to_hf
from examples.flax_hf_command import app
from revcore import Repeat, Reverse, SpecError, StoreAll, momentum_net
from revcore_torch.hf import make_reversible, stacks

pytestmark = pytest.mark.usefixtures("quickly_compiled_module")
DECODER, VIT = flax_decoder.PORT, flax_vit.PORT


def llama(depth: int, **options: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
        use_cache=False,
        **options,
    )


def vit(depth: int, **options: Any) -> ViTConfig:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"image_size": 8, "patch_size": 4, "num_channels": 2}
    return ViTConfig(num_hidden_layers=depth, **(sizes | options))


def model(port: Port, config: Any, kind: Any = "momentum", dtype: torch.dtype = torch.float64) -> Any:
    """Return a reversible model, with weights large enough for every layer to matter."""
    torch.manual_seed(0)
    made = port.architecture(config).train()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(4 * parameter if parameter.ndim > 1 else parameter + torch.rand_like(parameter) / 4)
    made = port.widened(made) if dtype == torch.float64 else made
    return make_reversible(made, kind)


def with_swapped(port: Port, one: str, other: str) -> Port:
    """Return a port that mistakes one projection for another of the same shape."""

    def names(config: Any) -> dict[str, str]:
        swapped = {f"body.*.attention.{a}": f"body.*.attention.{b}" for a, b in ((one, other), (other, one))}
        return {old: swapped.get(new, new) for old, new in port.names(config).items()}

    return dataclasses.replace(port, names=names)


# --- the same numbers -------------------------------------------------------------------------------------------------


def test_a_decoder_has_the_loss_and_gradients_of_the_torch_model() -> None:
    source = model(DECODER, llama(3))
    report = compare(DECODER, source, *DECODER.batch(source.config))
    assert report.ok, f"\n{report}"
    assert report.gradient_error is not None
    assert report.gradient_error < 1e-12
    assert {row.name for row in report.rows if row.kind == "gradient"} == {n for n, _ in source.named_parameters()}

    mistaken = compare(with_swapped(DECODER, "key", "value"), source, *DECODER.batch(source.config))
    assert not mistaken.ok
    assert mistaken.value_error is not None
    assert mistaken.value_error > 1e-3


def test_a_vision_transformer_has_the_loss_and_gradients_of_the_torch_model() -> None:
    source = model(VIT, vit(5), "leapfrog")
    report = compare(VIT, source, *VIT.batch(source.config))
    assert report.ok, f"\n{report}"
    assert report.gradient_error is not None
    assert report.gradient_error < 1e-12
    assert {row.name for row in report.rows if row.kind == "gradient"} == {n for n, _ in source.named_parameters()}

    mistaken = compare(with_swapped(VIT, "query", "key"), source, *VIT.batch(source.config))
    assert not mistaken.ok
    assert mistaken.gradient_error is not None
    assert mistaken.gradient_error > 1e-3


def test_tied_embeddings_biases_stretched_angles_and_padding() -> None:
    stretched = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0}
    stretched |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 4}
    options = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rope_parameters": stretched}
    source = model(DECODER, llama(2, **options), "revnet")
    tokens = DECODER.batch(source.config)[0]
    mask = np.ones_like(tokens)
    mask[1:, 5:] = 0
    inputs = {**DECODER.inputs(tokens), "attention_mask": torch.from_numpy(mask)}
    with jax.enable_x64(True), torch.no_grad():
        logits = nnx.jit(lambda module, *given: module(*given))(
            to_flax(DECODER, source, dtype=jnp.float64), tokens, mask
        )
        expected = source(**inputs).logits.numpy()
        unmasked = source(**DECODER.inputs(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(logits)[mask == 1], expected[mask == 1], rtol=1e-12, atol=1e-12)
    assert not np.allclose(unmasked[mask == 0], expected[mask == 0])


@pytest.mark.parametrize(
    ("port", "config"),
    [(DECODER, llama(3)), (DECODER, llama(2, tie_word_embeddings=True)), (VIT, vit(3, qkv_bias=False))],
    ids=["decoder", "tied", "vit"],
)
def test_weights_come_back_bit_for_bit(port: Port, config: Any) -> None:
    source = model(port, config, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    module = to_flax(port, source)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    to_hf(port, module, source)
    assert source.state_dict().keys() == before.keys()
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.any() or name.endswith("bias"), name


# --- what it costs ----------------------------------------------------------------------------------------------------


def residual(depth: int, policy: Any) -> int:
    """Return the bytes that wait for a decoder's backward pass, beyond its parameters."""
    config = llama(depth)
    program = folded(dataclasses.replace(momentum_net(depth, 0.5), split="zeros", merge="last"))
    graph, state = nnx.split(nnx.eval_shape(lambda: flax_decoder.Decoder(config, program, policy, nnx.Rngs(0))))
    tokens = jnp.zeros((2, 8), jnp.int32)

    def loss(state: Any) -> Any:
        return loss_of(nnx.merge(graph, state), tokens, tokens)[0]

    kept = jax.eval_shape(lambda state: jax.vjp(loss, state)[1], state)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    return size - sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def test_activation_memory_does_not_grow_with_depth() -> None:
    assert residual(2, Reverse()) == residual(8, Reverse()) > 0
    stream = 2 * 8 * 16 * 4
    assert residual(8, StoreAll()) > residual(8, Reverse()) + 8 * stream  # the count would see what a layer keeps


@pytest.mark.parametrize("depth", [1, 2, 5, 6])
@pytest.mark.parametrize("kind", ["momentum", "leapfrog", "revnet"])
def test_folding_changes_no_step(kind: Any, depth: int) -> None:
    program = stacks(model(VIT, vit(depth), kind))[0].program
    assert folded(program).unrolled == program.unrolled
    repeats = [step.n for step in folded(program).steps if isinstance(step, Repeat)]
    expected = {"momentum": depth, "leapfrog": (depth - 1) // 2, "revnet": depth // 2}[kind]
    assert repeats == [expected] * (expected > 1)


# --- what is refused, and the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("port", "config", "kind", "words"),
    [
        (DECODER, llama(2, attention_dropout=0.1), "momentum", "config.attention_dropout came as 0.1"),
        (DECODER, llama(2, hidden_act="gelu"), "momentum", "config.hidden_act came as 'gelu'"),
        (DECODER, llama(2), "bdia", "the model is of kind 'bdia'"),
        (
            DECODER,
            llama(2, rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}),
            "momentum",
            "rope_type came as 'dynamic'",
        ),
        (VIT, vit(2, hidden_dropout_prob=0.1), "momentum", "config.hidden_dropout_prob came as 0.1"),
    ],
    ids=["dropout", "activation", "bdia", "angles", "vit"],
)
def test_what_the_modules_have_no_form_for_is_refused(port: Port, config: Any, kind: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        to_flax(port, model(port, config, kind))


def test_a_model_that_is_not_reversible_and_a_name_that_is_not_in_the_table_are_refused() -> None:
    with pytest.raises(SpecError, match="0 reversible stacks, expected one: call make_reversible"):
        to_flax(VIT, VIT.architecture(vit(2)))
    source = model(DECODER, llama(2))
    with pytest.raises(SpecError, match=r"neither 'lm_head.weight' nor 'lm_head': add it"):
        renamed({"lm_head.weight": source.lm_head.weight}, VIT.names(source.config))


def run(port: Port, *arguments: Any) -> Any:
    return CliRunner().invoke(app(port), [*map(str, arguments)])


def test_options_that_will_not_do_are_refused(tmp_path: Path) -> None:
    VIT.architecture(vit(1)).save_pretrained(tmp_path / "vit")
    BertConfig().save_pretrained(tmp_path / "bert")
    vit(1).save_pretrained(tmp_path / "empty")
    shutil.copytree(tmp_path / "vit", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut short")
    for port, words, *arguments in (
        (VIT, "expected a folder that save_pretrained wrote", "--checkpoint", tmp_path / "nowhere"),
        (VIT, "holds a model of type 'bert', expected 'vit'", "--checkpoint", tmp_path / "bert"),
        (VIT, "has no weights that can be read", "--checkpoint", tmp_path / "empty"),
        (VIT, "has no weights that can be read", "--checkpoint", tmp_path / "cut"),
        (VIT, "a checkpoint has a depth of its own", "--checkpoint", tmp_path / "vit", "--depth", 3),
        (VIT, "the model is none for the digits", "--checkpoint", tmp_path / "vit", "--steps", 3),
        (VIT, "no step is to be trained", "--save", tmp_path / "new", "--steps", 0),
        (VIT, "which is there already", "--save", tmp_path),
        (VIT, "beta came as 0.5 with kind='revnet'", "--kind", "revnet", "--beta", 0.5),
        (DECODER, "beta came as 2.0", "--beta", 2),
    ):
        result = run(port, *arguments)
        assert isinstance(result.exception, SpecError), result.output
        assert words in str(result.exception)


def test_a_model_trained_in_flax_is_a_checkpoint_that_is_equal_in_flax(tmp_path: Path) -> None:
    tiny = dataclasses.replace(VIT, config=lambda depth: vit(depth, num_channels=1, num_labels=10))
    result = run(tiny, "--depth", 2, "--steps", 1, "--beta", 0.9, "--save", tmp_path / "trained")
    assert result.exit_code == 0, result.output or result.exception
    assert "Flax and Hugging Face agree" in result.output
    assert "Held-out accuracy: " in result.output
    result = run(tiny, "--checkpoint", tmp_path / "trained", "--steps", 0)
    assert result.exit_code == 0, result.output or result.exception
    assert "2 layers (kind momentum, beta 0.9)" in result.output
    wrong = run(with_swapped(tiny, "query", "key"), "--checkpoint", tmp_path / "trained")
    assert wrong.exit_code == 1, wrong.output or wrong.exception
    assert "do NOT agree" in wrong.output
    assert "Held-out" not in wrong.output
