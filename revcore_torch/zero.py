"""What DeepSpeed's engines cannot train rightly is refused at the first forward pass, with what to write instead.

DeepSpeed is recognised by what it leaves on parameters and on the call stack; nothing here imports it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from revcore.errors import SpecError

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check(blocks: Sequence[Any]) -> Sequence[Any]:
    """Return the blocks as they are to be called, if DeepSpeed can train them.

    Raises:
        SpecError: inside a DeepSpeed engine, an optimizer steps in the backward pass. (On the call of a function that
            is returned here: it uses a parameter that ZeRO-3 has parted, and no module is there to gather it.)

    >>> block = nn.Linear(2, 2)
    >>> check([block])[0] is block
    True
    """
    if "deepspeed" not in sys.modules or not _inside_engine():
        return blocks
    for block in blocks:
        if isinstance(block, nn.Module) and block not in _checked:
            _refuse_optimizers(block)
            _checked.add(block)
    return [block if block is None or isinstance(block, nn.Module) else _Watched(block) for block in blocks]


def _inside_engine() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("deepspeed.runtime."):
            return True
        frame = frame.f_back
    return False


# --- an optimizer in the backward pass --------------------------------------------------------------------------------


def _refuse_optimizers(block: nn.Module) -> None:
    for name, parameter in block.named_parameters():
        # at stages 1 to 3 DeepSpeed's own hooks are among them
        hooks = [*(parameter._post_accumulate_grad_hooks or {}).values()]  # type: ignore[attr-defined]
        hooks = [hook for hook in hooks if not _module_of(hook).startswith("deepspeed.")]
        if hasattr(parameter, "_in_backward_optimizers") or any(map(_holds_optimizer, hooks)):
            raise SpecError(
                f"an optimizer steps in the backward pass (a hook on the parameter {name} of {type(block).__name__}) "
                "of a model that DeepSpeed trains: it would step before the gradients of all ranks are averaged, on "
                "weights that DeepSpeed has copies of. Take out fused_optimizer= (or the hook), and give the "
                "optimizer to deepspeed.initialize"
            )


def _module_of(hook: Any) -> str:
    return getattr(hook, "__module__", None) or ""


def _holds_optimizer(value: Any, depth: int = 4) -> bool:
    if isinstance(value, Optimizer):
        return True
    return depth > 0 and any(_holds_optimizer(part, depth - 1) for part in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    """Yield what a hook can get at: what a function closes over, its defaults and globals; what an object holds."""
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty one: its variable is not set yet
                yield cell.cell_contents
        yield from value.__defaults__ or ()
        yield from (value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set)):
        yield from value
    elif not isinstance(value, (Tensor, nn.Module, type)) and type(value).__module__ not in sys.stdlib_module_names:
        yield from getattr(value, "__dict__", {}).values()


# --- functions with parameters that are parted ------------------------------------------------------------------------


class _Watched:
    """A block that is a function: DeepSpeed's hooks are modules', so a parameter that it uses by itself is refused."""

    __slots__ = ("__weakref__", "block")

    def __init__(self, block: Any) -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _RefuseParted(self.block):
            return self.block(*args, **kwargs)


class _RefuseParted(TorchFunctionMode):
    """Refuses operations on a parameter of ZeRO-3's that no module has gathered for them."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # reading an attribute is no use of it, and DeepSpeed reads and sets many while it gathers
        if getattr(func, "__name__", "") not in ("__get__", "__set__"):
            for value in (*args, *kwargs.values()):
                if isinstance(value, nn.Parameter) and not getattr(value, "ds_active_sub_modules", (True,)):
                    name = getattr(self.block, "__qualname__", type(self.block).__name__)
                    raise SpecError(
                        f"the block {name} is a function that uses a parameter of shape "
                        f"{tuple(value.ds_shape)} by itself, which ZeRO-3 has parted among the ranks: only the call "  # type: ignore[attr-defined]
                        "of an nn.Module gathers it. Wrap the function in an nn.Module that holds its parameters, "
                        "and give the module as the block"
                    )
        return func(*args, **kwargs)
