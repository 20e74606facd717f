"""Running a network on fake tensors: they have shapes, dtypes and devices, but no data, so any size fits any machine.

What runs is a copy. The network itself, its gradients, buffers and random states stay as they are.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses import fake_tensor as errors
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from revcore.errors import SpecError
from revcore_torch import outside
from revcore_torch.detect import nodes_of
from revcore_torch.reach import caches_of

_DATA_NEEDED = (errors.DataDependentOutputException, errors.DynamicOutputShapeException)
_NO_FAKE = (errors.UnsupportedOperatorException, errors.UnsupportedFakeTensorException)
_HINTS = ("FakeTensor", "fake tensor", "fake impl", "data pointer", "data_ptr", "meta tensor", "tensor subclasses")

# Their fake implementations leave out what the real kernels keep for the backward pass, which is most of it.
_UNTRUE = tuple(getattr(torch.ops.aten, name) for name in ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"))


class Fakes:
    """Makes fake copies; handed out by :func:`faking`."""

    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        self._mode, self._device = mode, device
        self._caches: list[tuple[Any, Any]] = []  # and what is in them, for what will be run is no copy all over

    def copy(self, value: Any) -> Any:
        """Return a deep copy of modules, tensors and whatever holds them, with a fake tensor for each tensor.

        Raises:
            SpecError: something in it cannot be copied.
        """
        memo: dict[int, Any] = {}
        self._caches += [(cache, _content(cache)) for cache in caches_of(pytree.tree_leaves(value))]
        modules = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, nn.Module)]
        if any(nn.parameter.is_lazy(p) for module in modules for p in module.parameters()):
            raise SpecError(
                "the network's lazy parameters have no shapes yet: call it once under torch.no_grad() first"
            )
        try:
            with _Copying(self.tensor):
                result = copy.deepcopy(value, memo)
        except (TypeError, RuntimeError, copy.Error) as error:
            raise SpecError(
                f"planning runs a copy of the network on fake tensors, but it cannot be copied ({error}): drop what "
                "copy.deepcopy(network) fails at, or choose a policy without a plan"
            ) from error
        for parameter in {p for module in modules for p in module.parameters()}:
            if parameter.grad is not None:
                memo[id(parameter)].grad = self.tensor(parameter.grad)
        return result

    def empty_caches(self) -> None:
        """Put back what functions, classes and global variables held before: a fake tensor there is of no use."""
        for cache, content in self._caches:
            if isinstance(cache, dict):
                if cache.keys() != content.keys():
                    cache.clear()
                    cache.update(content)
            elif isinstance(cache, list):
                if len(cache) != len(content):
                    cache[:] = content
            elif cache.cache_info().currsize != content:
                cache.cache_clear()

    def tensor(self, tensor: Tensor) -> Tensor:
        """Return a fake one like it; where it is on the meta device, on the one planned for."""
        if tensor.layout != torch.strided:
            return self._mode.from_tensor(tensor, static_shapes=True)
        device = self._device if tensor.device.type == "meta" else tensor.device
        fake = torch.empty_strided(tuple(tensor.shape), tuple(tensor.stride()), dtype=tensor.dtype, device=device)
        return fake.requires_grad_(tensor.requires_grad)


def _content(cache: Any) -> Any:
    return cache.copy() if isinstance(cache, (dict, list)) else cache.cache_info().currsize


class _Copying(TorchFunctionMode):
    """What ``copy.deepcopy`` does with tensors, meanwhile: a fake one for each."""

    def __init__(self, fake: Any) -> None:
        super().__init__()
        self._fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self._fake(tensor)
            return memo[id(tensor)]
        if func is torch._C.TensorBase.clone:  # pyright: ignore[reportAttributeAccessIssue]  # by Parameter.__deepcopy__
            return self._fake(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def faking(what: str, device: str = "cpu") -> Iterator[Fakes]:
    """Let everything run on fake tensors meanwhile, unseen by the caller's modes.

    Args:
        what: who plans, for errors.
        device: where the copies of what is on the meta device are.

    Raises:
        SpecError: an operation needs data, or has no fake implementation; ``device`` is not there.
    """
    there = torch.device(device)
    if there.type != "cpu" and not torch.get_device_module(there).is_available():
        raise SpecError(f"device came as {device!r}, which this PyTorch does not have here: plan for 'cpu'")
    glanced = outside.glance(everything=True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a function may close over real tensors
    fakes = Fakes(mode, there)
    try:
        # what is compiled would compile anew for fakes; without dynamo loaded (which takes seconds), nothing is
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
        with _disable_current_modes(), _own_hooks(), eager, mode, _Refusing(what):
            yield fakes
    except (*_DATA_NEEDED, *_NO_FAKE) as error:
        why = "needs the data" if isinstance(error, _DATA_NEEDED) else "has no fake implementation"
        raise SpecError(_message(what, f"the operation {getattr(error, 'func', error)} {why}")) from error
    except RuntimeError as error:
        if any(hint in str(error) for hint in _HINTS):
            raise SpecError(_message(what, str(error).strip().splitlines()[0])) from error
        raise
    finally:
        outside.put_back(glanced)
        fakes.empty_caches()


def _own_hooks() -> contextlib.AbstractContextManager[Any]:
    """Keep the caller's hooks from seeing what is saved: a network may be planned while a block of another runs."""
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    return saved_tensors_hooks(_same, _same) if hooked is not None else contextlib.nullcontext()


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Refusing(TorchDispatchMode):
    """Refuses what would make a plan too low."""

    supports_higher_order_operators = True

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "_overloadpacket", None) in _UNTRUE:
            library = "mkldnn" if func._overloadpacket is _UNTRUE[0] else "cudnn"
            why = f"{func} hides there what it keeps (torch.backends.{library}.flags(enabled=False) runs another)"
            raise SpecError(_message(self._what, why))
        return func(*args, **(kwargs or {}))


def _message(what: str, why: str) -> str:
    return (
        f"{what} runs the network on fake tensors, which have shapes but no data, and one did not go: {why}. Keep it "
        "out of the network's passes, give a custom operator a fake implementation (torch.library.register_fake), or "
        "choose a policy without a plan, such as Reverse()"
    )


@contextlib.contextmanager
def real_gradients_kept(loss: Tensor) -> Iterator[None]:
    """Let a backward pass on fakes run meanwhile, and put back the gradient of each real tensor that its graph met."""
    # of the nodes that accumulate the gradient of a leaf
    leaves = [node.variable for node in nodes_of(loss) if hasattr(node, "variable")]
    real = [(leaf, leaf.grad) for leaf in leaves if not isinstance(leaf, FakeTensor)]
    try:
        yield
    finally:
        for tensor, grad in real:
            tensor.grad = grad
