"""What a network keeps for its backward pass, counted where a trainer calls it."""

from __future__ import annotations

from typing import Any

from torch import nn

from revcore_torch.memory import LiveBytes


class Held:
    """The bytes that live after each forward call of a module and were made in it, its output with them.

    ``Held(model.blocks)``, and then whatever trains the model: ``bytes`` has one number for each call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.bytes: list[int] = []
        self._hooks = (
            module.register_forward_pre_hook(self._begin, prepend=True),
            module.register_forward_hook(self._end),
        )

    def _begin(self, *_: Any) -> None:
        self._memory = LiveBytes()
        self._memory.__enter__()

    def _end(self, *_: Any) -> None:
        self._memory.__exit__(None, None, None)
        self.bytes.append(self._memory.live)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
