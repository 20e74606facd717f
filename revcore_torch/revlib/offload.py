"""``target_device``: a block's parameters are elsewhere but for the time in which it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from revcore.errors import SpecError


def device_of(given: Any) -> torch.device | None:
    """Return the device that ``target_device`` names; ``None`` where parameters stay.

    >>> device_of("cpu"), device_of("")
    (device(type='cpu'), None)
    """
    if given is None or given == "":
        return None
    try:
        return torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise SpecError(
            f"target_device came as {given!r}, expected a device such as 'cuda' (or '' to leave parameters where they "
            f"are): {error}"
        ) from error


class OnDevice(nn.Module):
    """A block that is run with copies of its parameters and buffers on another device.

    The copies are part of the block's graph, and so are kept, dropped and made again as its activations are: under
    ``Reverse()`` one block's at a time. A gradient goes back through the copying, so it arrives at the parameter, where
    that is. Of the buffers, those that the block changed are copied back.

    >>> block = nn.Linear(2, 2)
    >>> OnDevice(block, torch.device("cpu"))(torch.ones(1, 2)).shape
    torch.Size([1, 2])
    """

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.block, self.device = block, device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _moved(self.block, self.device):
            return self.block(*args, **kwargs)


@contextlib.contextmanager
def _moved(block: nn.Module, device: torch.device) -> Iterator[None]:
    # not torch.func.functional_call: of a module that occurs twice in the block, it leaves the copies in place
    modules = list(block.modules())
    copies: dict[int, Tensor] = {}

    def moved(tensors: dict[str, Any]) -> dict[str, Any]:
        for tensor in tensors.values():
            if tensor is not None and id(tensor) not in copies:
                copies[id(tensor)] = _move(tensor, device)
        return {name: None if t is None else copies[id(t)] for name, t in tensors.items()}

    before = [(place, place.copy()) for m in modules for place in (m._parameters, m._buffers) if place]
    there = [moved(content) for _, content in before]
    versions = {id(copy): copy._version for copy in copies.values()}
    statistics = {
        id(buffer)
        for module in modules
        if isinstance(module, _NormBase) and module.training
        for buffer in module._buffers.values()
    }
    for (place, _), content in zip(before, there, strict=True):
        place.update(content)
    try:
        yield
        replaced = [
            name
            for (place, _), content in zip(before, there, strict=True)
            for name in content
            if place.get(name) is not content[name]
        ]
    finally:
        for place, content in before:
            place.clear()
            place.update(content)
        for module in modules:
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()  # a list of its own, of the copies
    if replaced:
        raise SpecError(
            f"a block replaced its buffer or parameter {replaced[0]} by another tensor, which target_device does not "
            "follow: change it in place (self.buffer.copy_(new))"
        )
    for _, content in before:
        for tensor in content.values():
            copy = copies.get(id(tensor))
            if copy is None or copy is tensor or isinstance(tensor, nn.Parameter):
                continue
            if id(tensor) in statistics:
                tensor.data.copy_(copy)  # as native_batch_norm changes them: autograd counts no change
            elif copy._version != versions[id(copy)]:
                with torch.no_grad():
                    tensor.copy_(copy)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    # Not non_blocking: an optimizer may change a pinned parameter while its copy is still on the way.
    return tensor.to(device)
