"""Where in a model the layers are that can be made reversible: found by structure, not by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from revcore.errors import SpecError


def find_stacks(model: nn.Module, layers: str | Sequence[str] | None) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists of layers in ``model``, with their names.

    A list is one whose items are all layers that Hugging Face could checkpoint (``GradientCheckpointingLayer``): each
    takes hidden states first and returns them. ``layers`` names lists instead.

    Raises:
        SpecError: none is there, or no list has that name.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module}
    if layers is not None:
        names = [layers] if isinstance(layers, str) else list(layers)
        for name in names:
            if name not in lists:
                raise SpecError(f"layers: the model has no list of layers {name!r}; it has {_named(lists)}")
        return [(name, lists[name]) for name in names]
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in lists.items():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if not inside and all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
            found.append((name, module))
    if not found:
        raise SpecError(
            f"{type(model).__name__} has no list of layers that are transformers' GradientCheckpointingLayer; it has "
            f"{_named(lists)}: name those that take hidden states first and return them, e.g. layers='encoder.layer'"
        )
    return found


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """Return the module whose forward loops over the list ``name``."""
    return model.get_submodule(name.rpartition(".")[0])


def _named(lists: dict[str, Any]) -> str:
    return ", ".join(f"{name!r} of {len(module)}" for name, module in lists.items()) or "none"
