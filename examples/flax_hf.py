"""What ``flax_decoder.py`` and ``flax_vit.py`` share: a Hugging Face model's weights go to Flax and back, by name.

The network is the one that ``revcore_torch.hf.make_reversible`` makes: its program is plain data, and runs in JAX as it
is. Loss and gradients are held against each other in float64. The command line: ``flax_hf_command.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import revcore_jax
import revcore_torch
from examples.tasks import TaskName
from revcore import Chain, Policy, Program, Repeat, Reverse, SpecError, amplification, parity, weights
from revcore_jax.nnx import ReversibleSequential, stack
from revcore_torch.hf import stacks

# --- the NNX side -----------------------------------------------------------------------------------------------------


def folded(program: Program) -> Program:
    """Return the same program with its pairs of equal steps in a ``Repeat``, which JAX runs as a scan.

    >>> from revcore import momentum_net
    >>> folded(momentum_net(12)).num_slots
    1
    """
    steps = program.unrolled

    def repeats(start: int) -> int:
        pair, n = steps[start : start + 2], 0
        while len(pair) == 2 and steps[start + 2 * n : start + 2 * n + 2] == pair:
            n += 1
        return n

    start = max((0, 1), key=repeats)  # the first step of a leapfrog is half as wide as the others
    n = repeats(start)
    if n < 2:
        return program
    pairs = Repeat(Chain(steps[start : start + 2]), n)
    return replace(program, steps=(*steps[:start], pairs, *steps[start + 2 * n :]))


def body(program: Program, policy: Policy, layer: Callable[[], nnx.Module]) -> ReversibleSequential:
    """Return the reversible layers; ``layer`` makes one, and those of a ``Repeat`` are stacked."""
    blocks = []
    for step in program.steps:
        if isinstance(step, Repeat):
            once = replace(program, steps=(step.step,))
            blocks += [stack([layer() for _ in range(step.n)]) for _ in range(once.num_slots)]
        elif replace(program, steps=(step,)).num_slots:
            blocks.append(layer())
    return ReversibleSequential(*blocks, program=program, policy=policy)


class Attention(nnx.Module):
    """``softmax(q·kᵀ/√d)·v`` of several heads; ``groups`` heads of keys and values serve as many queries each.

    (``jax.nn.dot_product_attention`` has its softmax in float32 whatever it is given, and would hide mistakes.)
    """

    def __init__(
        self, width: int, heads: int, groups: int, size: int, bias: bool, out_bias: bool, rngs: nnx.Rngs
    ) -> None:
        self.query = nnx.LinearGeneral(width, (heads, size), use_bias=bias, rngs=rngs)
        self.key = nnx.LinearGeneral(width, (groups, size), use_bias=bias, rngs=rngs)
        self.value = nnx.LinearGeneral(width, (groups, size), use_bias=bias, rngs=rngs)
        self.out = nnx.LinearGeneral((heads, size), width, axis=(-2, -1), use_bias=out_bias, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        turn: Callable[[jax.Array], jax.Array] = lambda x: x,
    ) -> jax.Array:
        """Return the layer's output for ``x`` (batch, time, width).

        Args:
            x: the input.
            mask: boolean, broadcastable to (batch, heads, queries, keys): where to look.
            turn: what is done to queries and keys, (batch, time, heads, size): their positions.
        """
        query, key, value = turn(self.query(x)), turn(self.key(x)), self.value(x)
        heads, groups, size = query.shape[-2], key.shape[-2], query.shape[-1]
        key, value = (jnp.repeat(part, heads // groups, axis=-2) for part in (key, value))
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * size**-0.5
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        shares = jax.nn.softmax(logits.astype(wide), axis=-1).astype(x.dtype)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", shares, value))


def loss_of(module: Any, inputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the mean cross-entropy, and the logits."""
    logits = module(inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), logits


_gradients = nnx.jit(nnx.value_and_grad(loss_of, has_aux=True))


# --- from one to the other --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Port:
    """A Hugging Face model, and the NNX module that computes the same.

    Attributes:
        task: what it is trained on.
        architecture: the class in ``transformers``.
        config: makes the configuration of a small model of so many layers, to be trained from nothing.
        module: makes the NNX module of a configuration, a program, a policy and random numbers; it refuses
            configurations that it has no form for. Its reversible layers are its attribute ``body``.
        names: for a configuration, the NNX names of Hugging Face's modules and parameters; ``*`` is a layer's number.
        widened: returns a copy of a model that computes in float64 all through.
        inputs: of a batch, what the Hugging Face model is called with.
        batch: for a configuration, inputs and targets drawn at random, to compare with.
        fits: whether a model of this configuration can be trained on the task.
    """

    task: TaskName
    architecture: Any
    config: Callable[[int], Any]
    module: Callable[[Any, Program, Policy, nnx.Rngs], Any]
    names: Callable[[Any], Mapping[str, str]]
    widened: Callable[[Any], Any]
    inputs: Callable[[np.ndarray], dict[str, Any]]
    batch: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    fits: Callable[[Any], bool]


def renamed(tensors: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return ``tensors`` under other names: those of the table, which are of modules or parameters.

    Raises:
        SpecError: a tensor that is not in the table.

    >>> renamed({"model.layers.7.mlp.up_proj.weight": 1}, {"model.layers.*.mlp.up_proj": "body.*.mlp.up"})
    {'body.7.mlp.up.weight': 1}
    """
    result = {}
    for name, tensor in tensors.items():
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        module, _, leaf = pattern.rpartition(".")
        if pattern in names:
            new = names[pattern]
        elif module in names:
            new = f"{names[module]}.{leaf}"
        else:
            raise SpecError(f"{name} came, and the table of names has neither {pattern!r} nor {module!r}: add it")
        result[new.replace("*", number[0]) if number else new] = tensor
    return result


def to_flax(port: Port, model: Any, policy: Policy = Reverse(), dtype: Any = jnp.float32) -> Any:  # noqa: B008
    """Return the NNX module that computes what a reversible Hugging Face model computes, with its weights.

    Raises:
        SpecError: the model is not reversible, or its configuration is one that the module has no form for.
    """
    module = nnx.eval_shape(lambda: port.module(model.config, folded(_program(model)), policy, nnx.Rngs(0)))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), nnx.state(module, nnx.Param))
    nnx.update(module, shapes)
    tensors = renamed(revcore_torch.to_neutral(model), port.names(model.config))
    revcore_jax.from_neutral(module, weights.stack(tensors, module.body.program, "body."))
    return module


def to_hf(port: Port, module: Any, model: Any) -> None:
    """Fill a Hugging Face model in place with the weights of the NNX module."""
    revcore_torch.from_neutral(model, hf_names(port, module, revcore_jax.to_neutral(module), model.config))


def hf_names(port: Port, module: Any, tensors: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Return weights or gradients of the NNX module (neutral) under Hugging Face's names, every layer apart."""
    apart = weights.unstack(tensors, module.body.program, "body.")
    return renamed(apart, {new: old for old, new in port.names(config).items()})


def compare(port: Port, model: Any, inputs: np.ndarray, targets: np.ndarray) -> parity.Report:
    """Hold a reversible Hugging Face model against its NNX module in float64: loss, logits, every gradient.

    16 depth·eps are allowed, times what a coupling's inverse makes of rounding (``revcore.amplification`` predicts it).

    Args:
        port: which model.
        model: what ``make_reversible`` made of a model that ``port.widened`` returned.
        inputs: a batch.
        targets: integers, one for each of the logits' rows.
    """
    model.zero_grad()
    logits = model(**port.inputs(inputs)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.from_numpy(targets).long().flatten())
    loss.backward()
    program, depth = _program(model), stacks(model)[0].depth
    expected = parity.Record(
        {"loss": loss, "logits": logits}, revcore_torch.to_neutral(model, gradients=True), depth, "float64"
    )
    with jax.enable_x64(True):
        module = to_flax(port, model, dtype=jnp.float64)
        (loss, logits), found = _gradients(module, inputs, targets)
        gradients = hf_names(port, module, revcore_jax.to_neutral(module, found), model.config)
    found = parity.Record({"loss": loss, "logits": logits}, gradients, depth, "float64")
    amplified = amplification(program, "float64").worst / (depth * parity.EPS["float64"])
    limit = 16 * max(1, round(amplified))
    return parity.compare(found, expected, limit=limit, names=("Flax", "Hugging Face"))


def check(config: Any, **forms: Any) -> None:
    """Refuse a configuration whose attributes are not ``forms``: the only ones that a module has."""
    for name, form in forms.items():
        if (value := getattr(config, name)) != form:
            raise SpecError(f"config.{name} came as {value!r}, and the NNX module has a form for {form!r} alone")


def _program(model: Any) -> Program:
    found = stacks(model)
    if len(found) != 1:
        raise SpecError(f"the model has {len(found)} reversible stacks, expected one: call make_reversible(model, …)")
    if found[0].settings.kind == "bdia":
        raise SpecError(
            "the model is of kind 'bdia', whose sign is drawn by torch: make it reversible as momentum, leapfrog or "
            "revnet"
        )
    return found[0].program
