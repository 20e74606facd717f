"""A reversible network as a list of layers for ``deepspeed.pipe.PipelineModule``."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from revcore.errors import SpecError
from revcore_torch.deepspeed.stage import Network, StepLayer, part_of, place
from revcore_torch.modules import ReversibleSequential


class StepSpec(LayerSpec):
    """What a stage makes one layer of. For ``partition_method="type:…"`` it is called as its block is."""

    def __init__(self, network: Network, number: int, block: Any) -> None:
        super().__init__(block.typename if isinstance(block, LayerSpec) else type(block))
        self.network, self.number, self.block = network, number, block

    def build(self, log: bool = False) -> StepLayer:
        block = self.block.build(log) if isinstance(self.block, LayerSpec) else self.block
        return StepLayer(self.network, self.number, block)


def to_pipeline_layers(model: Any, **settings: Any) -> list[Any]:
    """Return ``model`` as layers for DeepSpeed's ``PipelineModule``; its streams travel between stages as one tensor.

    The same network, to rounding: each stage runs its consecutive blocks as one reversible run, so that it keeps, for
    each micro-batch in flight, the streams at its end and what travels, however many blocks it has, and every block
    runs twice.

    Args:
        model: a ``ReversibleSequential``, or an ``nn.Sequential`` in which there is one, each block of which becomes a
            layer. Or the blocks alone, a sequence of ``deepspeed.pipe.LayerSpec`` or modules: of a spec a block is made
            on its own stage only.
        **settings: with a sequence of blocks, those of ``ReversibleSequential``: ``split_dim``, ``coupling``,
            ``num_streams``, ``program``, ``policy``, ``stream_dtype``, ``determinism_check``.

    Returns:
        A list, ``PipelineModule(layers=[embedding, *to_pipeline_layers(…), head], num_stages=…, loss_fn=…)``. The first
        layer takes a tensor, or a tuple of a tensor and what all blocks get beside their sources: tensors of integers
        or truth values, such as a mask. The last returns the output alone. ``partition_method="type:…"`` finds a layer
        by the class of its block. Layers of modules hold the model's own, so that afterwards ``model`` has the
        trained weights of this rank's stage; :func:`load_pipeline_checkpoint` gets all of them.

    Raises:
        SpecError: something else came; streams of several shapes (``same_shape=False``), a ``MemoryBudget``, an
            optimizer in the backward pass (``fused_optimizer``), parameters that a block shares with another layer;
            and, in ``PipelineModule``, blocks that share parameters across stages, part of the list, DeepSpeed's
            activation checkpointing around our layers.

    The schedule is 1F1B (Narayanan et al., arXiv 2006.09503) as DeepSpeed runs it.

    >>> import torch
    >>> from deepspeed.pipe import LayerSpec
    >>> blocks = [LayerSpec(torch.nn.Linear, 4, 4) for _ in range(6)]
    >>> layers = to_pipeline_layers(blocks, split_dim=-1, num_streams=3)
    >>> len(layers), layers[0].build().block
    (6, Linear(in_features=4, out_features=4, bias=True))
    """
    if isinstance(model, nn.Module):
        if settings:
            raise SpecError(f"{', '.join(settings)} came with a model, which has settings of its own: leave them out")
        layers = list(_layers_of(model))
        _check_untied(layers)
    else:
        layers = _layers_of_blocks(model, settings)
    _watch_places()
    return layers


def parts_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what an ``nn.Sequential`` calls one after the other, a ``ReversibleSequential`` as a whole."""
    if isinstance(model, ReversibleSequential):
        if type(model).forward is not ReversibleSequential.forward:
            raise SpecError(_OWN_FORWARD.format(type(model).__name__))
        yield model
    elif isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        for child in model:
            yield from parts_of(child)
    elif any(isinstance(module, ReversibleSequential) for module in model.modules()):
        raise SpecError(_OWN_FORWARD.format(type(model).__name__))
    else:
        yield model


_OWN_FORWARD = (
    "{} has a forward of its own, which nobody can cut into layers: give its parts in the order in which it calls "
    "them, layers=[model.embedding, *to_pipeline_layers(model.blocks), model.head]"
)


def _layers_of(model: nn.Module) -> Iterator[Any]:
    parts = list(parts_of(model))
    if not any(isinstance(part, ReversibleSequential) for part in parts):
        raise SpecError(
            f"{type(model).__name__} came, expected a ReversibleSequential, an nn.Sequential in which there is one, or "
            "a sequence of blocks"
        )
    for part in parts:
        if isinstance(part, ReversibleSequential):
            yield from _cut(part, [*part])
        else:
            yield part


def _layers_of_blocks(blocks: Any, settings: dict[str, Any]) -> list[Any]:
    try:
        blocks = list(blocks)
    except TypeError:
        raise SpecError(f"model came as {type(blocks).__name__}, expected a module or a sequence of blocks") from None
    for i, block in enumerate(blocks):
        if isinstance(block, TiedLayerSpec):
            raise SpecError(
                f"block {i} came as a TiedLayerSpec: a block of a reversible network cannot be tied to another layer. "
                "Tie layers outside of it, such as embedding and head"
            )
        if not isinstance(block, (LayerSpec, nn.Module)):
            raise SpecError(f"block {i} came as {type(block).__name__}, expected a LayerSpec or a module")
    # blocks are known to a stage alone, all else to every rank
    shell = ReversibleSequential(*[b if isinstance(b, nn.Module) else nn.Identity() for b in blocks], **settings)
    return _cut(shell, blocks)


def _cut(owner: ReversibleSequential, blocks: Sequence[Any]) -> list[Any]:
    if not blocks:
        raise SpecError("a ReversibleSequential without blocks came: there is nothing to cut into layers")
    if owner.revlib is not None and owner.revlib.fused is not None:
        raise SpecError(
            "fused_optimizer steps in the backward pass, of which a pipeline has one for each micro-batch: leave it "
            "out, and give DeepSpeed the optimizer"
        )
    if owner.revlib is not None and owner.revlib.target_device is not None:
        raise SpecError("target_device is the pipeline's to say: leave it out")
    if any((owner._forward_hooks, owner._forward_pre_hooks, owner._backward_hooks, owner._backward_pre_hooks)):
        raise SpecError(
            "the ReversibleSequential has hooks of its own, which nothing calls once it is cut into layers: register "
            "them on its blocks, or remove them"
        )
    if not owner.program.same_shape:
        raise SpecError("streams of several shapes (same_shape=False) cannot travel between stages as one tensor")
    total = len(owner.program.unrolled)
    part_of(owner.policy, 0, total, total)
    network = Network(owner, _sharing(blocks))
    return [StepSpec(network, i, block) for i, block in enumerate(blocks)]


def _sharing(blocks: Sequence[Any]) -> list[tuple[int, int]]:
    """Return the pairs of blocks that have a parameter in common."""
    first: dict[int, int] = {}
    pairs = []
    for i, block in enumerate(blocks):
        for parameter in block.parameters() if isinstance(block, nn.Module) else ():
            other = first.setdefault(id(parameter), i)
            if other != i:
                pairs.append((other, i))
    return pairs


def _check_untied(layers: Sequence[Any]) -> None:
    """Refuse parameters that a layer around the blocks shares with any other layer."""
    modules = [layer.block if isinstance(layer, StepSpec) else layer for layer in layers]
    for i, j in _sharing(modules):
        if not (isinstance(layers[i], StepSpec) and isinstance(layers[j], StepSpec)):
            raise SpecError(
                f"layers {i} ({type(modules[i]).__name__}) and {j} ({type(modules[j]).__name__}) share a parameter, "
                "which a pipeline keeps equal only if it is told so: write [TiedLayerSpec('embedding', nn.Embedding, "
                "…), *to_pipeline_layers(blocks), TiedLayerSpec('embedding', nn.Embedding, …, forward_fn=lambda "
                "module, x: x @ module.weight.T)]"
            )


@functools.cache
def _watch_places() -> None:
    """Be told where PipelineModule puts layers: none of its own calls says which others are in the same stage."""
    register_module_module_registration_hook(place)  # pyright: ignore[reportArgumentType]
