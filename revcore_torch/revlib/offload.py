"""``target_device``: a block's parameters are elsewhere but for the time in which it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from revcore.errors import SpecError
from revcore_torch.replay import put


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
    that is. Of the buffers, those that the block changed are copied back. A block that is itself a reversible network
    is given its own ``target_device``: copies are other objects than its tape knows, and refused by it.

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
    """Put copies on ``device`` in the places of the block's parameters and buffers meanwhile."""
    # not torch.func.functional_call: of a module that occurs twice in the block, it leaves the copies in place
    modules = list(block.modules())
    places: list[dict[str, Any]] = [place for m in modules for place in (m._parameters, m._buffers) if place]
    before = [place.copy() for place in places]
    tensors = {id(t): t for content in before for t in content.values() if t is not None}
    copies = {key: _move(tensor, device) for key, tensor in tensors.items()}
    versions = {key: copy._version for key, copy in copies.items()}
    there = [{name: copies.get(id(t)) for name, t in content.items()} for content in before]
    put([*zip(places, there, strict=True)])
    try:
        yield
        replaced = [n for place, copy in zip(places, there, strict=True) for n in copy if place.get(n) is not copy[n]]
    finally:
        put([*zip(places, before, strict=True)])
        for module in modules:
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()  # a list of its own, of the copies
    if replaced:
        raise SpecError(
            f"a block replaced its buffer or parameter {replaced[0]} by another tensor, which target_device does not "
            "follow: change it in place (self.buffer.copy_(new))"
        )
    for module in modules:
        statistics = isinstance(module, _NormBase) and module.training
        for buffer in module._buffers.values():
            if buffer is None or (copy := copies[id(buffer)]) is buffer:
                continue
            if statistics:
                buffer.data.copy_(copy)  # as native_batch_norm changes them: autograd counts no change
            elif copy._version != versions[id(buffer)]:
                with torch.no_grad():
                    buffer.copy_(copy)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    # Not non_blocking: an optimizer may change a pinned parameter while its copy is still on the way.
    return tensor.to(device)
