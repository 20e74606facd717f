"""Where in a model the layers are that can be made reversible: found by structure, not by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from revcore.errors import SpecError

Layers = nn.ModuleList | nn.ModuleDict


def find_stacks(model: nn.Module, layers: str | Sequence[str] | None) -> list[tuple[str, Layers]]:
    """Return the lists of layers in ``model``, with their names; by name also an ``nn.ModuleDict`` of layers.

    A list is one whose items are all layers that Hugging Face could checkpoint (``GradientCheckpointingLayer``): each
    takes hidden states first and returns them. ``layers`` names lists instead.

    Raises:
        SpecError: none is there, or no list has that name.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, Layers) and len(module)}
    if layers is not None:
        names = [layers] if isinstance(layers, str) else list(layers)
        for name in names:
            if name not in lists:
                raise SpecError(f"layers: the model has no list of layers {name!r}; it has {_named(lists)}")
        return [(name, lists[name]) for name in names]
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[tuple[str, Layers]] = []
    for name, module in lists.items():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleDict) or inside:
            continue
        if all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
            found.append((name, module))
    if not found:
        raise SpecError(
            f"{type(model).__name__} has no list of layers that are transformers' GradientCheckpointingLayer; it has "
            f"{_named(lists)}: name those that take hidden states first and return them, e.g. layers='encoder.layer'"
        )
    return found


def layers_of(module: Layers) -> list[nn.Module]:
    """Return the layers themselves, in their order."""
    return [*module.values()] if isinstance(module, nn.ModuleDict) else [*module]


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """Return the module whose forward loops over the list ``name``."""
    owner: nn.Module = model
    while name:
        name = name.rpartition(".")[0]
        owner = model.get_submodule(name)
        if not isinstance(owner, Layers):  # those are never called
            break
    return owner


def _named(lists: dict[str, Any]) -> str:
    return ", ".join(f"{name!r} of {len(module)}" for name, module in lists.items()) or "none"
