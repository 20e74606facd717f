"""How many bytes of tensors live, and how many at the peak: what a program needs, whatever an allocator adds.

>>> import torch
>>> with LiveBytes() as memory:
...     a = torch.zeros(1000)
...     b = a + 1
...     del a
>>> memory.live, memory.peak
(4000, 8000)
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["LiveBytes", "Meter"]


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of every tensor made in it, until it is freed; views count once.

    What an operation takes for itself and gives back before it returns (a kernel's scratch) is not seen. Tensors made
    before do not count, and freeing them is no gain.

    Attributes:
        live: the bytes that live now.
        peak: the most that lived at once, measured after each operation.

    >>> with LiveBytes() as memory:
    ...     a = torch.zeros(1000).double()
    >>> memory.live, memory.peak
    (8000, 12000)
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        # A storage's Python object is one and the same while the storage lives, so its id is a key until it is freed.
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in pytree.tree_leaves((args, kwargs)):
            self._see(leaf, counts=False)
        result = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):
            self._see(leaf, counts=True)
        self.peak = max(self.peak, self.live)
        return result

    def _see(self, leaf: Any, counts: bool) -> None:
        if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided:
            return
        storage = leaf.untyped_storage()
        if id(storage) not in self._sizes:
            self._sizes[id(storage)] = size = storage.nbytes() if counts else 0
            self.live += size
            weakref.finalize(storage, self._free, id(storage)).atexit = False

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class Meter(LiveBytes):
    """Counts work, too.

    Attributes:
        flops: of the operations that PyTorch has a formula for (as ``torch.utils.flop_counter``): products of matrices,
            convolutions, attention.
        made: the bytes of all tensors that were made.

    >>> a, b = torch.ones(2, 3), torch.ones(3, 4)
    >>> with Meter() as meter:
    ...     c = (a @ b).relu()
    >>> meter.flops, meter.made
    (48, 64)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result

    def _see(self, leaf: Any, counts: bool) -> None:
        before = self.live
        super()._see(leaf, counts)
        self.made += self.live - before
