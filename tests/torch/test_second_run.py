"""No silent second run (T21): each of these gives the plain network's numbers, or is refused in words.

What a block draws from and moves is found wherever it is held; what is not found, the comparison of values finds.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import copy
import functools
import hashlib
import itertools
import os
import random
import secrets
import time
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import revcore
from revcore import InversionError, SpecError
from revcore_torch import Checkpoint, MemoryBudget, Reverse, ReversibleSequential, StoreAll, outside, plan, reversible
from revcore_torch.fakes import faking
from revcore_torch.hf import make_reversible
from tests.torch.harness import WIDTH, make_input
from tests.torch.second_run import (
    DEPTH,
    SECOND,
    SITUATIONS,
    Block,
    Network,
    Setup,
    Situation,
    body,
    check,
    four,
    ours,
    plain,
    refused,
    same,
    train,
)

# --- random numbers that torch does not know --------------------------------------------------------------------------


def times(number: Any) -> Tensor:
    return torch.tensor(float(number), dtype=torch.float64)


@same("a numpy generator, an attribute of the block")
def _():
    return four(lambda: Block(lambda self, f: f * times(self.rng.random()), rng=np.random.default_rng(3)))


@same("numpy's old generator, with the second of two normal numbers left")
def _():
    return four(lambda: Block(lambda self, f: f * times(self.rng.normal()), rng=np.random.RandomState(3)))


@same("a bit generator of numpy")
def _():
    return four(
        lambda: Block(lambda self, f: f * times(np.random.Generator(self.bits).random()), bits=np.random.PCG64(3))
    )


@same("a generator of Python")
def _():
    return four(lambda: Block(lambda self, f: f * times(self.rng.random()), rng=random.Random(3)))


@same("generators in a list and in a dict of lists")
def _():
    def draw(self: Any, f: Tensor) -> Tensor:
        return f * times(self.held["here"][1][0].random()) * torch.rand(1, generator=self.listed[0], dtype=f.dtype)

    return four(
        lambda: Block(
            draw, held={"here": [0, (np.random.default_rng(3),)]}, listed=[torch.Generator().manual_seed(5), None]
        )
    )


@same("a generator that a function closes over, shared by all blocks")
def _():
    rng, layer = np.random.default_rng(3), body()
    return Setup([lambda x: layer(x) * times(rng.random())] * DEPTH, watched=[layer])


@same("a generator in functools.partial")
def _():
    def block(rng: Any, x: Tensor, *, other: Any) -> Tensor:
        return torch.tanh(x) * torch.rand(x.shape, generator=rng, dtype=x.dtype) * times(other.random())

    rng = torch.Generator().manual_seed(5)
    return [functools.partial(block, rng, other=random.Random(1))] * DEPTH


class Drawer:
    """An object of the user's, with a generator and a module."""

    def __init__(self) -> None:
        self.rng, self.layer = random.Random(3), body()

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x) * times(self.rng.random())

    def method(self, x: Tensor) -> Tensor:
        return self(x)


@same("an object that is called, with a generator")
def _():
    drawer = Drawer()
    return Setup([drawer] * DEPTH, watched=[drawer.layer])


@same("a bound method of such an object")
def _():
    drawer = Drawer()
    return Setup([drawer.method] * DEPTH, watched=[drawer.layer])


GLOBAL = np.random.default_rng(3)
NORM = nn.BatchNorm1d(WIDTH).double()


@same("a generator that is global to the block's function")
def _():
    GLOBAL.bit_generator.state = np.random.default_rng(3).bit_generator.state
    return [lambda x: torch.tanh(x) * times(GLOBAL.random())] * DEPTH


@same("a helper object of the block's that holds a generator")
def _():
    class Noise:
        def __init__(self) -> None:
            self.rng = np.random.default_rng(3)

    return four(lambda: Block(lambda self, f: f * times(self.noise.rng.random()), noise=Noise()))


@refused("a generator made anew in each run")
def _():
    return four(lambda: Block(lambda self, f: f * times(np.random.default_rng().random())))


@refused("random bytes of the operating system")
def _():
    return four(lambda: Block(lambda self, f: f * times(os.urandom(1)[0] + secrets.randbelow(1000))))


@refused("the clock")
def _():
    return four(lambda: Block(lambda self, f: f * times(time.perf_counter_ns() % 1009 + 1)))


@refused("a generator where nobody looks: the default of a class")
def _():
    class Hidden(Block):
        rng = itertools.count(1)

    Hidden.rng = itertools.count(1)
    return four(lambda: Hidden(lambda self, f: f / next(type(self).rng)))


@refused("a mask of a counter that is hashed")
def _():
    count = itertools.count()

    def keep(self: Any, f: Tensor) -> Tensor:
        digest = hashlib.sha256(str(next(count)).encode()).digest()
        return f * torch.tensor([b % 2 for b in digest[: f.shape[-1]]], dtype=f.dtype)

    return four(lambda: Block(keep))


# --- state ------------------------------------------------------------------------------------------------------------


def count(self: Any, f: Tensor) -> Tensor:
    self.calls += 1
    return f / self.calls


@refused("a counter in an attribute")
def _():
    return four(lambda: Block(count, calls=0))


@refused("a moving average in an attribute, a tensor made anew")
def _():
    def average(self: Any, f: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * f.detach().mean()
        return f * self.average

    return four(lambda: Block(average, average=torch.ones((), dtype=torch.float64)))


@same("a moving average in an attribute, in place")
def _():
    def average(self: Any, f: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(0.1 * f.detach().mean())
        return f * self.average.clone()

    return four(lambda: Block(average, average=torch.ones((), dtype=torch.float64)))


@refused("a variable that the block's function closes over and binds anew")
def _():
    def make() -> Any:
        calls = 0
        layer = body()

        def block(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return layer(x) / calls

        return block

    return four(make)


@refused("a counter inside a list")
def _():
    def counted(self: Any, f: Tensor) -> Tensor:
        self.calls[0] += 1
        return f / self.calls[0]

    return four(lambda: Block(counted, calls=[0]))


@refused("a global counter")
def _():
    calls = itertools.count(1)
    return four(lambda: Block(lambda self, f: f / next(calls)))


@refused("the input of before, kept in a deque")
def _():
    def lag(self: Any, f: Tensor) -> Tensor:
        self.past.append(f.detach())
        return f + self.past[0]

    return four(lambda: Block(lag, past=collections.deque([torch.zeros(())], maxlen=2)))


class DataBuffer(nn.Module):
    """Moves a buffer through ``.data``, which no version tells of, and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()
        self.register_buffer("average", torch.ones(WIDTH, dtype=torch.float64))
        self.average: Tensor

    def forward(self, x: Tensor) -> Tensor:
        f = self.body(x)
        self.average.data.mul_(0.9).add_(0.1 * f.detach().mean(0))
        return f * self.average.clone()


@same("a buffer moved through .data")
def _():
    return four(DataBuffer)


class FunctionalNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = body()
        self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))
        self.register_buffer("var", torch.ones(WIDTH, dtype=torch.float64))
        self.mean: Tensor
        self.var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(self.body(x), self.mean, self.var, training=True)


@same("F.batch_norm on the block's own buffers")
def _():
    return four(FunctionalNorm)


@same("statistics that are read after they moved")
def _():
    def read(self: Any, f: Tensor) -> Tensor:
        y = self.norm(f)
        return y * self.norm.running_mean.clone() + self.norm.num_batches_tracked

    return four(lambda: Block(read, norm=nn.BatchNorm1d(WIDTH).double()))


@same("statistics that are read before they move")
def _():
    def read(self: Any, f: Tensor) -> Tensor:
        scale = self.norm.running_var.clone()
        return self.norm(f) * scale

    return four(lambda: Block(read, norm=nn.BatchNorm1d(WIDTH).double()))


@same("a buffer through a NumPy view")
def _():
    class View(DataBuffer):
        def forward(self, x: Tensor) -> Tensor:
            f = self.body(x)
            self.average.numpy()[:] *= 0.9
            return f * self.average.clone()

    return four(View)


def norm() -> nn.Module:
    return nn.BatchNorm1d(WIDTH).double()


@same("a batch norm that a function closes over")
def _():
    layers = four(lambda: nn.Sequential(body(), norm()))
    return Setup([lambda x, layer=layer: layer(x) for layer in layers], watched=layers)


@same("a batch norm in functools.partial, one in the default of an argument")
def _():
    layers = four(norm)

    def block(layer: Any, x: Tensor, other: Any = layers[0]) -> Tensor:
        return torch.tanh(layer(x)) + other(x)

    return Setup([functools.partial(block, layer) for layer in layers[1:]], watched=layers)


@same("a batch norm in a plain list of a module, and one of a bound method")
def _():
    hidden = [nn.Sequential(norm(), nn.Dropout(0.3)) for _ in range(DEPTH)]
    holder = Drawer()
    holder.layer = nn.Sequential(body(), norm())
    blocks = [Block(lambda self, f: self.listed[0](f), listed=[layer]) for layer in hidden]
    return Setup([*blocks[:3], holder.method], watched=[*hidden, holder.layer])


@same("a batch norm that is global to a function")
def _():
    NORM.reset_running_stats()
    NORM.zero_grad()
    return Setup([lambda x: torch.tanh(NORM(x))] * DEPTH, watched=[NORM])


@same("a function around a module with hooks and dropout")
def _():
    events: list[str] = []

    def step(network: Network) -> list[Tensor]:
        seen = train(network)
        return [*seen, torch.tensor(float(len(events)))]

    layers = four(lambda: nn.Sequential(body(), nn.Dropout(0.4)))
    for layer in layers:
        layer.register_full_backward_hook(lambda *_: events.append("backward"))
    return Setup([lambda x, layer=layer: layer(x) for layer in layers], step, layers)


@same("spectral norm, whose vectors move in each run")
def _():
    return four(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh()).double())


@same("parametrize.cached() around both passes")
def _():
    blocks = four(lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)), nn.Tanh()).double())

    def step(network: Network) -> list[Tensor]:
        seen = []
        for _ in range(2):
            with parametrize.cached():
                x = make_input()
                y = network(x)
                y.pow(2).sum().backward()
                seen += [y, x.grad]
        return seen

    return Setup(blocks, step)


# --- changed between the forward and the backward pass ---------------------------------------------------------------


def between(change: Any, *args: Any) -> Any:
    """One step of training with something done between its two passes."""

    def step(network: Network) -> list[Tensor]:
        x = make_input()
        y = network(x, *args)
        change()
        y.pow(2).sum().backward()
        assert x.grad is not None
        return [y, x.grad]

    return step


def scaled() -> list[Any]:
    return four(lambda: Block(lambda self, f: f * self.scale, scale=1.0))


@refused("an attribute is changed before the backward pass")
def _():
    blocks = scaled()
    return Setup(blocks, between(lambda: [setattr(block, "scale", 0.5) for block in blocks]))


@refused("one block's is")
def _():
    blocks = scaled()
    return Setup(blocks, between(lambda: setattr(blocks[1], "scale", 1.001)))


@refused("an adapter is switched off before the backward pass")
def _():
    def adapted(self: Any, f: Tensor) -> Tensor:
        return f + self.adapter(f) if self.enabled else f + 0 * self.adapter(f)

    blocks = four(lambda: Block(adapted, enabled=True, adapter=nn.Linear(WIDTH, WIDTH).double()))
    return Setup(blocks, between(lambda: [setattr(block, "enabled", False) for block in blocks]))


@refused("weights are changed through .data")
def _():
    blocks = four(body)
    return Setup(blocks, between(lambda: [p.data.mul_(0.5) for block in blocks for p in block.parameters()]))


@same("a buffer that the blocks move is changed between the passes")
def _():
    blocks = four(DataBuffer)
    return Setup(blocks, between(lambda: [block.average.data.mul_(0.5) for block in blocks]))


@refused("an entry of a dict that a block reads is changed")
def _():
    settings = {"scale": 1.0}
    blocks = four(lambda: Block(lambda self, f: f * self.settings["scale"], settings=settings))
    return Setup(blocks, between(lambda: settings.update(scale=0.5)))


@refused("a table that a block reads is changed through NumPy")
def _():
    table = np.ones(WIDTH)
    blocks = four(lambda: Block(lambda self, f: f * torch.from_numpy(table)))
    return Setup(blocks, between(lambda: table.__imul__(0.5)))


@refused("an argument is changed through .data", "was changed after the forward pass")
def _():
    mask = torch.rand(WIDTH, dtype=torch.float64)
    return Setup(four(lambda: Block(lambda self, f, mask: f * mask)), between(lambda: mask.data.mul_(0.5), mask))


@refused("a forward method is replaced", f"{SECOND}|ran differently|0 times the second time", silent=False)
def _():
    blocks = four(body)
    return Setup(blocks, between(lambda: [setattr(block, "forward", torch.sin) for block in blocks]), blocks)


@refused("a hook that changes the output is taken off")
def _():
    blocks = four(body)
    handles = [block.register_forward_hook(lambda _, __, out: 2 * out) for block in blocks]
    return Setup(blocks, between(lambda: [handle.remove() for handle in handles]))


@same("evaluation mode is switched on before the backward pass")
def _():
    blocks = four(lambda: nn.Sequential(body(), norm(), nn.Dropout(0.4)))
    return Setup(blocks, between(lambda: [block.eval() for block in blocks]))


@same("training mode, of a module that a function reaches")
def _():
    layers = four(lambda: nn.Sequential(body(), norm(), nn.Dropout(0.4)).eval())
    blocks = [lambda x, layer=layer: layer(x) for layer in layers]
    return Setup(blocks, between(lambda: [layer.train() for layer in layers]), layers)


@same("another default dtype, and random numbers drawn, before the backward pass")
def _():
    def change() -> None:
        torch.rand(3)
        random.random()
        np.random.rand()  # noqa: NPY002

    return Setup(four(lambda: nn.Sequential(body(), nn.Dropout(0.4))), between(change))


# --- open in the forward pass alone, or around both ------------------------------------------------------------------


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.tanh else out


class DispatchDoubled(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.mul(2) if func is torch.ops.aten.sin.default else out


def inside(context: Any, both: bool) -> Any:
    """One step of training with a context open, around both passes or the forward pass alone."""

    def step(network: Network) -> list[Tensor]:
        x = make_input()
        with contextlib.ExitStack() as stack:
            stack.enter_context(context())
            y = network(x)
            if not both:
                stack.close()
            y.pow(2).sum().backward()
        assert x.grad is not None
        return [y, x.grad]

    return step


def tanh_blocks() -> list[Any]:
    return four(lambda: Block(lambda self, f: torch.tanh(f) + torch.sin(f)))


@same("a TorchFunctionMode around both passes")
def _():
    return Setup(tanh_blocks(), inside(Doubled, both=True))


@refused("a TorchFunctionMode around the forward pass alone")
def _():
    return Setup(tanh_blocks(), inside(Doubled, both=False))


@same("a TorchDispatchMode around both passes")
def _():
    return Setup(tanh_blocks(), inside(DispatchDoubled, both=True))


@refused("a TorchDispatchMode around the forward pass alone")
def _():
    return Setup(tanh_blocks(), inside(DispatchDoubled, both=False))


SCALE = contextvars.ContextVar("scale", default=1.0)


@contextlib.contextmanager
def scale_set() -> Any:
    token = SCALE.set(0.5)
    try:
        yield
    finally:
        SCALE.reset(token)


@same("a context variable around both passes", policies=["reverse", "checkpoint"])
def _():
    return Setup(four(lambda: Block(lambda self, f: f * SCALE.get())), inside(scale_set, both=True))


@refused("a context variable around the forward pass alone")
def _():
    return Setup(four(lambda: Block(lambda self, f: f * SCALE.get())), inside(scale_set, both=False))


@same("autocast around the forward pass alone, on float32 inside", policies=["reverse", "checkpoint", "anchors"])
def _():
    context = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=False)
    return Setup(four(lambda: nn.Sequential(body(), nn.Dropout(0.3))), inside(context, both=False))


# --- graphs inside a block --------------------------------------------------------------------------------------------


class Equilibrium(nn.Module):
    """z = tanh(W z + x), solved without a graph, differentiated by a fixed point in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH).double()
        with torch.no_grad():
            self.linear.weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(50):
                z = torch.tanh(self.linear(z) + x)
        z = torch.tanh(self.linear(z) + x)
        if not z.requires_grad:
            return z
        z0 = z.detach().requires_grad_()
        f0 = torch.tanh(self.linear(z0) + x.detach())

        def solve(grad: Tensor) -> Tensor:
            g = grad
            for _ in range(50):
                g = torch.autograd.grad(f0, z0, g, retain_graph=True)[0] + grad
            return g

        z.register_hook(solve)
        return z


@same("a deep equilibrium model, whose hook differentiates a graph of the forward pass")
def _():
    return four(Equilibrium)


class Inner(torch.autograd.Function):
    """Holds a graph of its own from the forward to the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = torch.tanh(ctx.x).sin()
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return torch.autograd.grad(ctx.y, ctx.x, grad, retain_graph=True)[0]


@same("a Function with a graph inside")
def _():
    warnings.filterwarnings("ignore", message=".*keeps tensors on ctx")
    return four(lambda: Block(lambda self, f: Inner.apply(f)))


@same("a block that takes a gradient inside its forward pass")
def _():
    def force(self: Any, f: Tensor) -> Tensor:
        with torch.enable_grad():
            q = f.clone() if f.requires_grad else f.detach().requires_grad_()
            return -torch.autograd.grad(q.cos().sum(), q, create_graph=True)[0]

    return four(lambda: Block(force))


@refused("torch.func.grad inside a block", "torch.autograd.grad", silent=False)
def _():
    return four(lambda: Block(lambda self, f: torch.func.grad(lambda q: q.cos().sum())(f)))


@same("torch.func.vmap inside a block")
def _():
    def block(self: Any, f: Tensor) -> Tensor:
        return torch.func.vmap(lambda q: q.sin() * q.sum())(f)

    return four(lambda: Block(block))


# --- what a block is given --------------------------------------------------------------------------------------------


@same("one tensor given as two arguments")
def _():
    def block(self: Any, f: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return f * (k.sum() if k is v else 0 * v.sum())

    memory = torch.rand(WIDTH, dtype=torch.float64, requires_grad=True)

    def step(network: Network) -> list[Any]:
        return [*train(network, memory, memory), memory.grad]

    return Setup(four(lambda: Block(block)), step)


@same("a parameter, a tensor with an attribute, and a computed tensor as arguments")
def _():
    def block(self: Any, f: Tensor, weight: Tensor, mark: Any, *, h: Tensor) -> Tensor:
        return f * (2 if isinstance(weight, nn.Parameter) else 3) * weight * mark.factor + h.sin()

    weight = nn.Parameter(torch.rand(WIDTH, dtype=torch.float64))
    mark: Any = torch.ones(1)
    mark.factor = 0.5

    def step(network: Network) -> list[Any]:
        seen = []
        for _ in range(2):
            x = make_input()
            y = network(x, weight, mark, h=weight.exp())
            y.pow(2).sum().backward()
            seen += [y, x.grad]
        return [*seen, weight.grad]

    return Setup(four(lambda: Block(block)), step)


@same("nn.MultiheadAttention with one memory as key and value")
def _():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True).double()

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.attention(x, memory, memory, need_weights=False)[0]

    memory = torch.rand(5, WIDTH, dtype=torch.float64, requires_grad=True)

    def step(network: Network) -> list[Any]:
        return [*train(network, memory), memory.grad]

    return Setup(four(Cross), step)


@same("an object as an argument, which the block changes by binding anew", policies=["reverse"])
def _():
    class Settings:
        scale = 0.5

    settings = Settings()
    return Setup(
        four(lambda: Block(lambda self, f, settings: f * settings.scale)), lambda network: train(network, settings)
    )


# --- random state of a step ------------------------------------------------------------------------------------------


@same("a block that seeds")
def _():
    def block(self: Any, f: Tensor) -> Tensor:
        torch.manual_seed(11)
        return nn.functional.dropout(f, 0.4)

    return four(lambda: Block(block))


@same("a block that forks the generator")
def _():
    def block(self: Any, f: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            f = nn.functional.dropout(f, 0.4)
        return nn.functional.dropout(f, 0.4)

    return four(lambda: Block(block))


@same("Python's and numpy's global generators, with batch statistics in the steps that are stored")
def _():
    def block(self: Any, f: Tensor) -> Tensor:
        return self.norm(f) * times(random.random() + np.random.rand())  # noqa: NPY002

    return four(lambda: nn.Sequential(Block(block, norm=norm()), nn.Dropout(0.3)))


@same("own generators drawn from, where results of drawing operations are kept")
def _():
    def block(self: Any, f: Tensor) -> Tensor:
        first = torch.rand(f.shape, generator=self.rng, dtype=f.dtype)
        return torch.tanh(f) * first * torch.rand(f.shape, generator=self.rng, dtype=f.dtype)

    return four(lambda: Block(block, rng=torch.Generator().manual_seed(3)))


# --- kinds of blocks -------------------------------------------------------------------------------------------------


@same("TorchScript blocks", policies=["reverse", "anchors", "checkpoint", "by step"])
def _():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return four(lambda: torch.jit.trace(body(), torch.rand(4, WIDTH, dtype=torch.float64)))


@same("an embedding that renormalizes its weights", policies=["reverse"])
def _():
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.table = body(), nn.Embedding(10, WIDTH).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.table(torch.arange(4))

    return four(Bag)


@refused("an embedding with max_norm, which changes its weights in the forward pass", "max_norm|in place", silent=False)
def _():
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.table = body(), nn.Embedding(10, WIDTH, max_norm=0.5).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.table(torch.arange(4))

    return four(Bag)


@refused("an operation of the user's that is not deterministic by more than rounding")
def _():
    rng = itertools.count()

    def noisy(self: Any, f: Tensor) -> Tensor:
        return f * (1 + 1e-4 * (next(rng) % 7))

    return four(lambda: Block(noisy))


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test(situation: Situation) -> None:
    check(situation)


# --- what needs a test of its own -------------------------------------------------------------------------------------


COMPILED = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Registers(nn.Module):
    """Registers hooks each time it runs: on a module, where it changes an output, and on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body: Any = body()

    def forward(self, x: Tensor) -> Tensor:
        f = self.body(x)
        self.body[0].register_forward_hook(lambda _, __, out: out * 1.5)
        self.body[2].weight.register_hook(lambda grad: grad * 0.5)
        return f


def test_hooks_are_registered_once_a_call() -> None:
    found = []
    for make in (plain, lambda blocks: ours(blocks, Reverse()), lambda blocks: ours(blocks, Checkpoint(every=2))):
        torch.manual_seed(0)
        blocks = four(Registers)
        found.append([*train(make(blocks)), *(p.grad for block in blocks for p in block.parameters())])
        assert [len(block.body[0]._forward_hooks) for block in blocks] == [2] * DEPTH
        assert [len(block.body[2].weight._backward_hooks) for block in blocks] == [2] * DEPTH
    for other in found[1:]:
        for got, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def in_place(x: Tensor, f: Tensor) -> Tensor:
    return x.add_(f)


def test_a_coupling_that_writes_in_place_is_refused() -> None:
    blocks, coupling = four(body), revcore.Coupling.from_functions(in_place, torch.sub)
    x = make_input()
    for policy in (Reverse(), Checkpoint(), StoreAll()):
        with pytest.raises(SpecError, match=r"changed its stream or f in place.*x \+ f for x.add_\(f\)"):
            reversible(revcore.revnet(DEPTH, coupling), blocks, [t.clone() for t in x.chunk(2, 1)], policy=policy)


def test_a_kept_result_that_an_extra_output_shares_and_somebody_changes() -> None:
    """As the plain network refuses it, whose graph keeps the same memory."""

    def block(self: Any, f: Tensor) -> Any:
        h = torch.tanh(f)
        return h + f, h

    blocks, policy = four(lambda: Block(block)), Reverse(recompute=[torch.ops.aten.tanh.default])
    for network in (plain(blocks), ours(blocks, policy)):
        y, aux = network(make_input())
        aux[1][0].detach().add_(1)
        with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
            y.sum().backward()


def test_a_draw_of_the_blocks_own_generator_that_is_kept() -> None:
    def block(self: Any, f: Tensor) -> Tensor:
        kept = torch.rand(f.shape, generator=self.rng, dtype=f.dtype)
        return torch.tanh(f) * kept * torch.empty_like(f).uniform_(generator=self.rng)

    policy = Reverse(recompute=[torch.ops.aten.rand.generator])
    found = []
    for make in (plain, lambda blocks: ours(blocks, policy)):
        torch.manual_seed(0)
        found.append(train(make(four(lambda: Block(block, rng=torch.Generator().manual_seed(3))))))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@COMPILED
def test_cond_and_compiled_autograd() -> None:
    def block(self: Any, f: Tensor) -> Tensor:
        return torch.cond(f.sum() > 0, torch.sin, torch.cos, (f,))

    torch._dynamo.reset()
    for blocks, context in (
        ([Block(block), Block(block)], contextlib.nullcontext()),
        ([body(), body()], compiled_autograd._enable(torch.compile(backend="eager"))),
    ):
        found = []
        for network, around in ((ours(blocks, Reverse()), context), (plain(blocks), contextlib.nullcontext())):
            x = make_input()
            with around:
                network(x).pow(2).sum().backward()
            found.append(x.grad)
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_jagged_streams() -> None:
    offsets, blocks = torch.tensor([0, 2, 7, 10]), [nn.Sequential(body(), nn.Dropout(0.3)) for _ in range(3)]

    def gradients(run: Any) -> list[Tensor]:
        torch.manual_seed(1)
        values = [torch.randn(10, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        a, b = run(*[torch.nested.nested_tensor_from_jagged(v, offsets) for v in values])
        (a.values().pow(2).sum() + b.values().sum()).backward()
        return [v.grad for v in values if v.grad is not None]

    def by_hand(a: Tensor, b: Tensor) -> Any:
        for block in blocks:
            a, b = b, a + block(b)
        return a, b

    for policy in (Reverse(), Checkpoint()):
        for got, expected in zip(
            gradients(lambda *streams, policy=policy: reversible(revcore.revnet(3), blocks, streams, policy=policy)),
            gradients(by_hand),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


class Looped(nn.Module):
    """Layers as a Hugging Face model calls them, with something done before each."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.layers, self.before = nn.ModuleList([Layer() for _ in range(DEPTH)]), before

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            self.before()
            x = layer(x)
        return x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = body()

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(self.body(x), 0.4)


@pytest.mark.parametrize("before", [lambda: torch.manual_seed(3), lambda: torch.rand(3)], ids=["seeds", "draws"])
def test_random_numbers_between_the_layers_of_a_loop(before: Any) -> None:
    found = []
    for policy in (StoreAll(), Reverse(), Checkpoint(every=2)):
        torch.manual_seed(0)
        model = make_reversible(Looped(before), "momentum", beta=0.9, policy=policy, layers="layers")
        x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
        model(x).pow(2).sum().backward()
        found.append(x.grad)
    for grad in found[1:]:
        torch.testing.assert_close(grad, found[0], rtol=1e-12, atol=1e-12)


Pair = collections.namedtuple("Pair", "first second")


@COMPILED
def test_compiled_arguments_in_dicts_of_any_key_and_named_tuples() -> None:
    def block(self: Any, f: Tensor, table: Any, pair: Any) -> Tensor:
        return f * table[3] + pair.second * table[1, 2]

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ReversibleSequential(Block(block), Block(block))
    table, pair = (
        {3: torch.rand(WIDTH).double(), (1, 2): torch.rand(WIDTH).double()},
        Pair(1, torch.rand(WIDTH).double()),
    )
    found = []
    for run in (torch.compile(model, backend="eager", fullgraph=True), plain([*model])):
        x = make_input()
        run(x, table, pair).pow(2).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@COMPILED
def test_compiled_blocks_that_draw_from_python() -> None:
    """And one that counts its calls, whose second run is refused there as anywhere."""

    def draw(self: Any, f: Tensor) -> Tensor:
        return f * random.random()

    found = []
    for compiled in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        random.seed(0)
        model = ReversibleSequential(Block(draw), Block(draw))
        run = torch.compile(model, backend="eager") if compiled else plain([*model])
        found.append([*train(run), torch.tensor(random.random())])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(InversionError, match=SECOND):
        train(torch.compile(ReversibleSequential(Block(count, calls=0), Block(count, calls=0)), backend="eager"))


TABLES: dict[int, Tensor] = {}


@functools.cache
def cached_table(width: int) -> Tensor:
    return torch.linspace(0.5, 1, width, dtype=torch.float64)


class Tables(nn.Module):
    shared: ClassVar[list[Tensor]] = []

    def __init__(self) -> None:
        super().__init__()
        self.body, self.rng = body(), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] not in TABLES:
            TABLES[x.shape[-1]] = torch.ones_like(x[:1])
        if not self.shared:
            self.shared.append(torch.ones_like(x[:1]))
        number = self.rng.random() + random.random() + np.random.rand()  # noqa: NPY002
        return self.body(x) * cached_table(x.shape[-1]) * TABLES[x.shape[-1]] * self.shared[0] * number


def states(model: Any) -> tuple[Any, ...]:
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy[2], model[0].rng.bit_generator.state


@pytest.mark.parametrize("what", ["plan", "budget", "compile"])
def test_nothing_that_a_plan_does_can_be_seen_afterwards(what: str) -> None:
    cached_table.cache_clear()
    TABLES.clear()
    Tables.shared.clear()
    model, x = ReversibleSequential(Tables(), Tables(), Tables()), make_input()
    before = states(model)
    if what == "plan":
        plan(model, x)
    elif what == "budget":
        model.policy = MemoryBudget(bytes=1)
        with pytest.raises(SpecError, match="the least that this network takes"):
            model(x)
    else:
        torch._dynamo.reset()
        with faking("a test") as fakes:
            copied, fake = fakes.copy(([*model], x))
            copied[0](fake.chunk(2, 1)[0])
    assert states(model) == before
    assert not TABLES
    assert not Tables.shared
    assert cached_table.cache_info().currsize == 0


def test_a_pass_that_is_repeated_takes_back_stored_steps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's generator is recorded from the pass on that moved it, which is run once more."""
    monkeypatch.setattr(outside, "recorded", [])

    def block(self: Any, f: Tensor) -> Tensor:
        return nn.functional.dropout(self.norm(f), 0.3) * random.random()

    blocks = four(lambda: Block(block, norm=norm()))
    results = []
    for run in (plain(copy.deepcopy(blocks)), ours(blocks, [StoreAll(), Reverse(), StoreAll(), Checkpoint()])):
        torch.manual_seed(0)
        random.seed(0)
        results.append(run(make_input()))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert [block.norm.num_batches_tracked.item() for block in blocks] == [1] * DEPTH
