"""``stream_dtype=``: streams in a wider dtype than the blocks, the same in both backends, and what it is for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from revcore import (
    Anchor,
    Bijection,
    Chain,
    Checkpoint,
    Couple,
    Momentum,
    Program,
    Repeat,
    Reverse,
    SpecError,
    StoreAll,
)
from revcore.parity import to_numpy
from tests.conformance.backends import load_backend
from tests.tiers import product

WIDTH = 16


class Learned:
    """A learned bijection, as both backends take it."""

    def forward(self, w: Any, a: Any, b: Any) -> Any:
        return a * 2, b + a * w[0]

    def inverse(self, w: Any, a: Any, b: Any) -> Any:
        return a / 2, b - (a / 2) * w[0]


class Torch:
    """The few things that the tests need of torch."""

    def __init__(self) -> None:
        import torch

        self.xp, self.engine = torch, load_backend("torch").engine
        self.float64: Any = contextlib.nullcontext

    def array(self, value: Any, dtype: str) -> Any:
        return self.xp.tensor(value, dtype=self.dtype(dtype))

    def dtype(self, name: str) -> Any:
        return getattr(self.xp, name)

    def cast(self, array: Any, dtype: str) -> Any:
        return array.to(self.dtype(dtype))

    def normalized(self, x: Any) -> Any:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-3).sqrt()

    def blocks(self, functions: Any, params: Any) -> Any:
        return [self._bound(f, p) for f, p in zip(functions, params, strict=True)]

    @staticmethod
    def _bound(function: Any, p: Any) -> Any:
        class Bound:
            def __call__(self, *args: Any) -> Any:
                return function(p, *args)

            def forward(self, *args: Any) -> Any:
                return function.forward(p, *args)

            def inverse(self, *args: Any) -> Any:
                return function.inverse(p, *args)

        bound = Bound()
        if hasattr(function, "forward"):
            bound.__class__.__call__ = Bound.forward
        return bound

    def run(self, program: Program, functions: Any, params: Any, streams: Any, **settings: Any) -> Any:
        return self.engine.reversible(program, self.blocks(functions, params), streams, **settings)

    def gradients(self, loss: Callable[..., Any], params: Any, streams: Any) -> list[np.ndarray]:
        leaves = [leaf.detach().requires_grad_() for leaf in (*params, *streams)]
        loss(leaves[: len(params)], tuple(leaves[len(params) :])).backward()
        return [to_numpy(leaf.grad) for leaf in leaves]

    def at_once(self) -> Any:
        return contextlib.nullcontext()


class Jax(Torch):
    """The same of JAX."""

    def __init__(self) -> None:
        import jax

        self.jax, self.xp, self.engine = jax, jax.numpy, load_backend("jax").engine
        self.float64 = jax.enable_x64

    def array(self, value: Any, dtype: str) -> Any:
        return self.xp.asarray(value, dtype)

    def dtype(self, name: str) -> Any:
        return self.xp.dtype(name)

    def cast(self, array: Any, dtype: str) -> Any:
        return array.astype(dtype)

    def normalized(self, x: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) / self.xp.sqrt(x.var(-1, keepdims=True) + 1e-3)

    def run(self, program: Program, functions: Any, params: Any, streams: Any, **settings: Any) -> Any:
        return self.engine.reversible(program, functions, params, streams, **settings)

    def gradients(self, loss: Callable[..., Any], params: Any, streams: Any) -> list[np.ndarray]:
        return [to_numpy(leaf) for leaf in self.jax.tree.leaves(self.jax.grad(loss, (0, 1))(params, streams))]

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Operation by operation, for a compiler may leave out a rounding to bfloat16."""
        with self.jax.disable_jit():
            yield


_frameworks: dict[str, Torch] = {}


@pytest.fixture(params=["torch", "jax"])
def framework(request: pytest.FixtureRequest) -> Torch:
    load_backend(request.param)
    if request.param not in _frameworks:
        _frameworks[request.param] = {"torch": Torch, "jax": Jax}[request.param]()
    return _frameworks[request.param]


def make_block(framework: Torch) -> Any:
    def block(w: Any, *sources: Any) -> Any:
        x = sources[0] if len(sources) == 1 else sources[0] + sources[1]
        assert x.dtype == w.dtype, "a block got its source in another dtype than came in"
        return framework.xp.tanh(framework.normalized(x) @ w[:, : x.shape[-1]].T @ w[:, : x.shape[-1]])

    return block


def make_anchor(w: Any, a: Any, b: Any) -> Any:
    assert a.dtype == w.dtype
    return a @ w.T, b @ w.T


def numbers(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) * scale


def network(framework: Torch, program: Program, dtype: str) -> tuple[list[Any], list[Any], tuple[Any, ...]]:
    """Return functions, parameters and streams for ``program``."""
    functions: list[Any] = []
    block = make_block(framework)
    for step in program.unrolled:
        if step.block:
            kinds = {Couple: block, Anchor: make_anchor, Bijection: Learned()}
            functions.append(kinds[type(step)])
    params = [
        framework.array(numbers(WIDTH, WIDTH, scale=WIDTH**-0.5, seed=i + 1), dtype) for i in range(len(functions))
    ]
    streams = tuple(framework.array(numbers(8, WIDTH, seed=100 + i), dtype) for i in range(program.num_streams))
    return functions, params, streams


def by_hand(
    framework: Torch, program: Program, functions: Any, params: Any, streams: Any, narrow: str, wide: str
) -> Any:
    """The network as one would write it: streams in ``wide``, blocks in ``narrow``."""
    given = iter(zip(functions, params, strict=True))
    streams = [framework.cast(s, wide) for s in streams]
    for step in program.unrolled:
        if isinstance(step, Couple):
            sources = [streams[i] for i in step.sources]
            if step.combine == "sum":
                sources = [sources[0] + sources[1]] if len(sources) > 1 else sources
            f = sources[0]
            if step.block:
                block, w = next(given)
                f = block(w, *[framework.cast(s, narrow) for s in sources])
            streams[step.target] = step.coupling.forward(streams[step.target], f)
        elif isinstance(step, Anchor):
            block, w = next(given)
            streams = [framework.cast(s, wide) for s in block(w, *[framework.cast(s, narrow) for s in streams])]
        elif step.block:
            block, w = next(given)
            streams = list(block.forward(w, *streams))
        else:
            streams = list(step.forward(*streams))  # type: ignore[misc]
    return tuple(framework.cast(streams[i], narrow) for i in program.output)


def revnet(depth: int) -> Program:
    return Program([Couple(i % 2, 1 - i % 2) for i in range(depth)])


def swap(a: Any, b: Any) -> Any:
    return b, a


PROGRAMS = {
    "additive": revnet(5),
    "momentum, sums": Program(
        [Couple(0, (1, 2), combine="sum"), Couple(1, 0, Momentum(0.9)), Couple(2, (0, 1)), Couple(0, 1, block=False)],
        num_streams=3,
    ),
    "an anchor": Program([*revnet(3).steps, Anchor(), *revnet(4).steps]),
    "bijections": Program([Couple(0, 1), Bijection(), Couple(1, 0), Bijection(swap, swap), Couple(0, 1)]),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=list(PROGRAMS))
def test_values_and_gradients_are_those_of_the_network_written_by_hand(framework: Torch, program: Program) -> None:
    functions, params, streams = network(framework, program, "bfloat16")
    with framework.at_once():
        ours = framework.run(program, functions, params, streams, stream_dtype="float32", policy=StoreAll())
        theirs = by_hand(framework, program, functions, params, streams, "bfloat16", "float32")
        kept = framework.run(program, functions, params, streams, policy=StoreAll())

        def loss(run: Any) -> Any:
            return lambda params, streams: sum((framework.cast(y, "float32") ** 2).sum() for y in run(params, streams))

        got = framework.gradients(
            loss(lambda p, s: framework.run(program, functions, p, s, stream_dtype="float32", policy=StoreAll())),
            params,
            streams,
        )
        expected = framework.gradients(
            loss(lambda p, s: by_hand(framework, program, functions, p, s, "bfloat16", "float32")), params, streams
        )
    assert [y.dtype for y in ours] == [s.dtype for s in streams]
    assert all(np.array_equal(to_numpy(a), to_numpy(b)) for a, b in zip(ours, theirs, strict=True))
    assert any(not np.array_equal(to_numpy(a), to_numpy(b)) for a, b in zip(ours, kept, strict=True)), "it did nothing"
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", product(PROGRAMS, fast=lambda name: name in ("momentum, sums", "an anchor")))
def test_every_policy_has_the_gradients_of_storing_everything(framework: Torch, name: str) -> None:
    """Over streams so wide that no rounding of theirs reaches a block, they are equal."""
    program = PROGRAMS[name]
    functions, params, streams = network(framework, program, "float32")

    def gradients(policy: Any) -> list[np.ndarray]:
        def loss(params: Any, streams: Any) -> Any:
            given = (program, functions, params, streams)
            return sum((y * y).sum() for y in framework.run(*given, stream_dtype="float64", policy=policy))

        return framework.gradients(loss, params, streams)

    with framework.float64(), framework.at_once():
        expected = gradients(StoreAll())
        for policy in (Reverse(), Checkpoint(2)):
            for got, right in zip(gradients(policy), expected, strict=True):
                assert np.linalg.norm(got - right) <= 1e-6 * np.linalg.norm(right), policy


def deep(framework: Torch, depth: int) -> tuple[Program, list[Any], list[Any], tuple[Any, ...]]:
    """Return a deep network; for JAX as one scan, which compiles fast."""
    program = revnet(depth)
    functions, params, streams = network(framework, program, "bfloat16")
    if not isinstance(framework, Jax):
        return program, functions, params, streams
    stacked = [framework.xp.stack(params[i::2]) for i in range(2)]
    return Program([Repeat(Chain(program.steps[:2]), depth // 2)]), functions[:2], stacked, streams


def drift(framework: Torch, stream_dtype: str | None, depth: int = 32) -> float:
    """Return the error that the rebuild adds to the gradients of so many bfloat16 blocks."""
    program, functions, params, streams = deep(framework, depth)

    def gradients(policy: Any) -> np.ndarray:
        def loss(params: Any, streams: Any) -> Any:
            given = (program, functions, params, streams)
            out = framework.run(*given, stream_dtype=stream_dtype, policy=policy)
            return sum((framework.cast(y, "float32") ** 2).sum() for y in out)

        return np.concatenate([g.ravel() for g in framework.gradients(loss, params, streams)])

    expected = gradients(StoreAll())
    return float(np.linalg.norm(gradients(Reverse()) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.long)], indirect=True)
def test_float32_streams_drift_less_than_bfloat16_ones(framework: Torch) -> None:
    assert drift(framework, "float32") <= 5e-3
    assert drift(framework, None) >= 2e-2, "streams in bfloat16 are no worse, so that the test above shows nothing"


def kept_by_torch(depth: int, stream_dtype: Any) -> list[tuple[str, int]]:
    """Return dtype and size of what the graph of a reversible network of bfloat16 blocks holds, less parameters."""
    from revcore_torch.detect import nodes_of

    framework = Torch()
    functions, params, streams = network(framework, revnet(depth), "bfloat16")
    params = [p.requires_grad_() for p in params]
    out = framework.run(revnet(depth), functions, params, streams, stream_dtype=stream_dtype)
    kept = [t for node in nodes_of(out) if "_Keep" in type(node).__name__ for t in node.saved_tensors]  # type: ignore[attr-defined]
    return [(str(t.dtype).removeprefix("torch."), t.numel()) for t in kept]


def kept_by_jax(depth: int, stream_dtype: Any) -> list[tuple[str, int]]:
    framework = Jax()
    program, functions, params, streams = deep(framework, depth)

    def residual(params: Any, streams: Any) -> Any:
        def run(params: Any) -> Any:
            return framework.run(program, functions, params, streams, stream_dtype=stream_dtype)

        return framework.jax.vjp(run, params)[1]

    leaves = framework.jax.tree.leaves(framework.jax.eval_shape(residual, params, streams))
    return [(str(leaf.dtype), leaf.size) for leaf in leaves if leaf.shape == (8, WIDTH)]


@pytest.mark.parametrize(("name", "kept"), [("torch", kept_by_torch), ("jax", kept_by_jax)], ids=["torch", "jax"])
def test_two_float32_streams_are_held_at_any_depth(name: str, kept: Any) -> None:
    load_backend(name)
    for depth in (4, 16):
        assert kept(depth, "float32") == [("float32", 8 * WIDTH)] * 2
    assert kept(4, None) == [("bfloat16", 8 * WIDTH)] * 2


def test_the_inverse_goes_back_through_wide_streams(framework: Torch) -> None:
    program = PROGRAMS["bijections"]
    functions, params, streams = network(framework, program, "bfloat16")
    blocks = (functions, params) if isinstance(framework, Jax) else (framework.blocks(functions, params),)
    with framework.at_once():
        out = framework.run(program, functions, params, streams, stream_dtype="float32")
        back = framework.engine.inverse(program, *blocks, out, stream_dtype="float32")
        report = {dtype: _report(framework, program, blocks, streams, dtype).worst for dtype in (None, "float32")}
    for a, b in zip(back, streams, strict=True):
        assert a.dtype == b.dtype
        assert np.linalg.norm(to_numpy(a) - to_numpy(b)) <= 0.05 * np.linalg.norm(to_numpy(b))
    assert report["float32"] < 1e-5 < report[None]


def _report(framework: Torch, program: Program, blocks: Any, streams: Any, stream_dtype: Any) -> Any:
    if isinstance(framework, Jax):
        return framework.engine.check_inverse(program, *blocks, streams, stream_dtype=stream_dtype)
    from revcore_torch.functional import inverse_report

    return inverse_report(program, *blocks, streams, stream_dtype=stream_dtype)


REFUSED = {
    "integers": ("bfloat16", "int32", "expected a floating-point"),
    "no name": ("bfloat16", "flo", "expected a floating-point"),
    "another kind": ("bfloat16", 32, "expected a floating-point"),
    "narrower": ("float32", "bfloat16", "float32, but stream_dtype="),
    "less range": ("bfloat16", "float16", "never rounded"),
    "less digits": ("float16", "bfloat16", "never rounded"),
    "complex": ("float32", "complex64", "never rounded"),
}


@pytest.mark.parametrize(("dtype", "stream_dtype", "words"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_refused(framework: Torch, dtype: str, stream_dtype: Any, words: str) -> None:
    given = (revnet(2), *network(framework, revnet(2), dtype))
    with pytest.raises(SpecError, match=words):
        framework.run(*given, stream_dtype=stream_dtype)


def test_streams_of_two_dtypes_and_wider_anchors_are_refused(framework: Torch) -> None:
    functions, params, (x, y) = network(framework, revnet(2), "bfloat16")
    with pytest.raises(SpecError, match="float32, but with stream_dtype"):
        framework.run(revnet(2), functions, params, (x, framework.cast(y, "float32")), stream_dtype="float32")
    anchor = [lambda w, a, b: (framework.cast(a, "float64"), b)]
    with framework.float64(), pytest.raises(SpecError, match=r"Anchor.* returned a stream of .*float64"):
        framework.run(Program([Anchor()]), anchor, params[:1], (x, y), stream_dtype="float32")


def test_the_dtype_of_the_framework_is_taken_too(framework: Torch) -> None:
    given = (revnet(2), *network(framework, revnet(2), "bfloat16"))
    one, two = (framework.run(*given, stream_dtype=d) for d in ("float32", framework.dtype("float32")))
    assert all(np.array_equal(to_numpy(a), to_numpy(b)) for a, b in zip(one, two, strict=True))


def test_jax_has_no_float64_unless_it_is_switched_on() -> None:
    load_backend("jax")
    framework = Jax()
    with pytest.raises(SpecError, match="jax_enable_x64"):
        framework.run(revnet(2), *network(framework, revnet(2), "float32"), stream_dtype="float64")


# --- modules ----------------------------------------------------------------------------------------------------------


def torch_model(split: Any, **settings: Any) -> tuple[Any, Any]:
    load_backend("torch")
    import torch

    import revcore_torch

    torch.manual_seed(0)
    width = 12 if split is None else 6
    blocks = [torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh()) for _ in range(4)]
    model = revcore_torch.ReversibleSequential(*blocks, split_dim=split, **settings).bfloat16()
    return model, torch.tensor(numbers(3, 12), dtype=torch.bfloat16, requires_grad=True)


def torch_by_hand(model: Any, x: Any, mean: bool) -> Any:
    import torch

    a, b = (x.float(), x.float()) if mean else (t.float() for t in x.chunk(2, 1))
    for block in model:
        a, b = b, a + block(b.bfloat16())
    return (((a + b) / 2) if mean else torch.cat((a, b), 1)).bfloat16()


@pytest.mark.filterwarnings(  # what dynamo does itself, as in tests/torch/test_compositions_compile.py
    "ignore:.*should not be instantiated. Methods on autograd functions",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)
@pytest.mark.parametrize(
    ("way", "split"),
    product(
        ("eager", "compiled", "compiled around the tape"),
        (1, None),
        fast=lambda way, split: way == "eager" or (way, split) == ("compiled", 1),
    ),
)
def test_torch_modules(way: str, split: int | None) -> None:
    """The streams are joined before the result is narrowed, whoever joins them."""
    import revcore_torch

    model, x = torch_model(split, stream_dtype="float32")
    import torch

    run: Any = model
    if way != "eager":
        if way != "compiled":
            model.policy = Reverse(recompute=[torch.ops.aten.addmm.default])
        run = torch.compile(model, backend="eager", fullgraph=way == "compiled")
    y = run(x)
    (y.float() ** 2).sum().backward()
    got = [x.grad, *[p.grad for p in model.parameters()]]
    x.grad = None
    model.zero_grad()
    expected = torch_by_hand(model, x, split is None)
    (expected.float() ** 2).sum().backward()
    assert torch.equal(y, expected)
    for a, b in zip(got, [x.grad, *[p.grad for p in model.parameters()]], strict=True):
        assert torch.linalg.vector_norm(a - b) <= 1e-2 * torch.linalg.vector_norm(b)
    model.stream_dtype = None
    assert not torch.equal(model(x), y)
    with pytest.raises(SpecError, match="came as 'int8'"):
        model.stream_dtype = "int8"
    if split is not None:
        assert revcore_torch.ReversibleSequential(*model, stream_dtype="float32")[1:].stream_dtype == torch.float32
        model.stream_dtype = "float32"
        assert model.inverse(model(x)).dtype == torch.bfloat16
        assert revcore_torch.check_inverse(model, x).worst < 1e-5


def test_torch_budget_and_autocast() -> None:
    import revcore_torch

    model, x = torch_model(1, stream_dtype="float32")
    import torch

    y = model(x)
    for policy in (revcore_torch.MemoryBudget(bytes=2**20), [StoreAll(), Reverse(), Checkpoint(), Reverse()]):
        model.policy = policy
        assert torch.equal(model(x), y)
    model, x = model.float(), x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        one = model(x)
        model.stream_dtype = None
        two = model(x)
    assert one.dtype == torch.float32
    assert torch.equal(one, two), "streams in float32 are what autocast has anyway"


@pytest.mark.parametrize("axis", [-1, None])
def test_flax_modules(axis: int | None) -> None:
    load_backend("jax")
    import jax
    import jax.numpy as jnp
    from flax import linen, nnx

    import revcore_jax.linen
    import revcore_jax.nnx

    width = 12 if axis is None else 6
    x = jnp.asarray(numbers(3, 12), "bfloat16")
    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    blocks = [nnx.Linear(width, width, rngs=nnx.Rngs(i), **half) for i in range(4)]
    model = revcore_jax.nnx.ReversibleSequential(*blocks, axis=axis, stream_dtype="float32")

    def by_hand(x: Any, blocks: Any) -> Any:
        a, b = (x.astype("float32"),) * 2 if axis is None else jnp.split(x.astype("float32"), 2, -1)
        for block in blocks:
            f = block(b.astype("bfloat16"))
            assert f.dtype == "bfloat16"
            a, b = b, a + f
        return ((a + b) / 2 if axis is None else jnp.concatenate((a, b), -1)).astype("bfloat16")

    flax_model = revcore_jax.linen.ReversibleSequential(
        [linen.Dense(width, **half) for _ in range(4)], axis=axis, stream_dtype=jnp.float32
    )
    with jax.disable_jit():
        y = model(x)
        assert y.dtype == x.dtype
        assert bool((y == by_hand(x, blocks)).all())
        made: Any = flax_model.init_with_output(jax.random.key(0), x)
        first, variables = made
        layers = [lambda x, p=variables["params"][f"layers_{i}"]: x @ p["kernel"] + p["bias"] for i in range(4)]
        z: Any = flax_model.apply(variables, x)
        assert z.dtype == first.dtype == x.dtype
        assert bool((z == by_hand(x, layers)).all())
        assert bool((z == first).all())
        if axis is not None:
            assert model.inverse(y).dtype == x.dtype
        model.stream_dtype = None
        assert not bool((model(x) == y).all())
    with pytest.raises(SpecError, match="came as 'int8'"):
        revcore_jax.nnx.ReversibleSequential(*blocks, stream_dtype="int8")
    with pytest.raises(SpecError, match="came as 'int8'"):
        flax_model.clone(stream_dtype="int8").init(jax.random.key(0), x)
