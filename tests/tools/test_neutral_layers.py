"""Every layer kind: weights carried between torch, NNX and Linen bit for bit, and the layers then compute the same."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from tests.helpers import assert_close, tree_error
from tests.tools.neutral_cases import F64, LAYERS, NORM, Case

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from flax import linen, nnx  # noqa: E402
from torch import nn  # noqa: E402

from revcore.weights import load, save  # noqa: E402
from revcore_jax import neutral as jax_neutral  # noqa: E402
from revcore_torch import neutral as torch_neutral  # noqa: E402

pytestmark = pytest.mark.usefixtures("quickly_compiled_module")


# Each of these fails with one of the others: another rank of the same convolution, a parameter less
LONG = ("linear without bias", "conv2d", "conv2d strided", "conv3d", "conv_transpose strided", "attention without bias")
EACH = [pytest.param(case, id=case.name, marks=pytest.mark.long if case.name in LONG else ()) for case in LAYERS]


@pytest.fixture(params=EACH)
def case(request: pytest.FixtureRequest) -> Any:
    with jax.enable_x64(True):
        yield request.param


def make_torch(case: Case) -> nn.Module:
    """The torch layer in float64, every parameter and statistic random (they start at 0 and 1)."""
    layer = case.torch().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
    return layer


def make_nnx(case: Case) -> nnx.Module:
    """The NNX layer before it has values: shapes, which the weights that are carried over will fill."""
    layer = nnx.eval_shape(lambda: case.nnx(nnx.Rngs(0)))
    for _, variable in nnx.to_flat_state(nnx.state(layer, nnx.BatchStat)):
        shape = variable.get_value()
        assert shape.dtype == np.float32  # NNX makes statistics in float32 whatever param_dtype says
        variable.set_value(jax.ShapeDtypeStruct(shape.shape, F64))
    return layer


def make_linen(case: Case, x: np.ndarray) -> tuple[linen.Module, Any, Any]:
    layer = case.linen()
    inputs = to_flax(case, x)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), inputs)
    variables = jax.tree.map(lambda s: jnp.zeros(s.shape, F64), shapes)
    return layer, variables, jax_neutral.linen_layers(layer, inputs)


def make_input(case: Case) -> np.ndarray:
    rng = np.random.default_rng(2)
    return rng.integers(0, 7, case.shape) if case.integer else rng.standard_normal(case.shape)


def to_flax(case: Case, x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1) if case.channels_second else x


def to_torch(case: Case, y: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(y), -1, 1) if case.channels_second else np.asarray(y)


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Bit for bit: names, dtypes and values."""
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_round_trip_is_exact(case: Case, tmp_path: Any) -> None:
    source = make_torch(case)
    first = torch_neutral.to_neutral(source)
    save(tmp_path / "weights.safetensors", first)
    tensors, _ = load(tmp_path / "weights.safetensors")

    over_nnx = make_nnx(case)
    jax_neutral.from_neutral(over_nnx, tensors)
    _, variables, layers = make_linen(case, make_input(case))
    variables = jax_neutral.from_neutral(variables, jax_neutral.to_neutral(over_nnx), layers=layers)
    last = jax_neutral.to_neutral(variables, layers=layers)
    assert_same(last, first)
    assert all(array.flags.c_contiguous for array in last.values())

    target = case.torch().double()
    torch_neutral.from_neutral(target, last)
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name


def test_layers_agree(case: Case) -> None:
    """Forward and gradients, of the parameters and of the input, to the rounding of a single layer."""
    source, x = make_torch(case), make_input(case)
    tensors = torch_neutral.to_neutral(source)
    g = np.random.default_rng(3)
    xt = torch.from_numpy(x) if case.integer else torch.from_numpy(x).requires_grad_()
    y = source(xt)
    weight = g.standard_normal(tuple(y.shape))
    (y * torch.from_numpy(weight)).sum().backward()
    expected = torch_neutral.to_neutral(source, gradients=True)
    inputs, weight = jnp.asarray(to_flax(case, x)), jnp.asarray(to_flax(case, weight))

    layer = make_nnx(case)
    jax_neutral.from_neutral(layer, tensors)
    graph, state = nnx.split(layer)

    def loss(function: Any, tree: Any, x: Any) -> Any:
        y = function(tree, x)
        return (y * weight).sum(), y

    def check(function: Any, tree: Any) -> Any:
        grad = jax.jit(jax.grad(functools.partial(loss, function), argnums=0 if case.integer else (0, 1), has_aux=True))
        grads, out = grad(tree, inputs)
        assert tree_error(to_torch(case, out), y) <= 1e-12
        if not case.integer:
            grads, dx = grads
            assert_close(to_torch(case, dx), xt.grad, limit=100)
        return grads

    grads = check(lambda state, x: nnx.merge(graph, state)(x), state)
    parameters = nnx.filter_state(grads, nnx.Param)
    assert_close(jax_neutral.to_neutral(layer, parameters), expected, limit=100)

    module, variables, layers = make_linen(case, x)
    variables = jax_neutral.from_neutral(variables, tensors, layers=layers)
    grads = check(module.apply, variables)["params"]
    for tree in (grads, {"params": grads}):
        assert_close(jax_neutral.to_neutral(variables, tree, layers=layers), expected, limit=100)


def test_linen_by_names_alone_is_right_or_refused(case: Case) -> None:
    """Within a model that names its layers itself, what cannot be told is refused, and the rest is right."""
    x = make_input(case)
    model = linen.Sequential([case.linen()])
    shapes = jax.eval_shape(model.init, jax.random.key(0), to_flax(case, x))
    variables = jax.tree.map(lambda s: np.arange(s.size, dtype=F64).reshape(s.shape), shapes)
    exact = jax_neutral.to_neutral(variables, layers=jax_neutral.linen_layers(model, to_flax(case, x)))
    if "conv" in case.name:
        with pytest.raises(ValueError, match=r"0\.kernel has shape .* pass layers=linen_layers"):
            jax_neutral.to_neutral(variables)
    else:
        assert_same(jax_neutral.to_neutral(variables), exact)
    assert sorted(exact) == sorted(torch_neutral.to_neutral(nn.Sequential(case.torch())))


def test_batch_norm_in_training_moves_the_same_statistics() -> None:
    case = next(c for c in LAYERS if c.name == "batch_norm")
    with jax.enable_x64(True):
        source, x = make_torch(case).train(), make_input(case)
        layer = nnx.BatchNorm(6, momentum=0.9, use_running_average=False, rngs=nnx.Rngs(0), **NORM)
        for variable in (layer.mean, layer.var):
            variable.set_value(variable.get_value().astype(F64))
        module = linen.BatchNorm(momentum=0.9, use_running_average=False, **NORM)
        inputs = jnp.asarray(to_flax(case, x))
        before = torch_neutral.to_neutral(source)
        jax_neutral.from_neutral(layer, before)
        layers = jax_neutral.linen_layers(module, inputs)
        shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
        shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, F64), shapes)
        variables = jax_neutral.from_neutral(shapes, before, layers=layers)

        y = source(torch.from_numpy(x))
        assert tree_error(to_torch(case, layer(inputs)), y) <= 1e-12
        out, moved = module.apply(variables, inputs, mutable=["batch_stats"])
        assert tree_error(to_torch(case, out), y) <= 1e-12

        # torch keeps the unbiased variance, Flax the biased one; the rest is equal
        after, n = torch_neutral.to_neutral(source), x.size // 6
        batch = (after["running_var"] - 0.9 * before["running_var"]) * (n - 1) / n
        after["running_var"] = 0.9 * before["running_var"] + batch
        assert_close(jax_neutral.to_neutral(layer), after)
        assert_close(jax_neutral.to_neutral({**variables, **moved}, layers=layers), after)
        assert source.num_batches_tracked == 1


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(d, marks=pytest.mark.long) for d in ("float16", "float32"))]
)
def test_narrow_dtypes_are_carried_as_they_are(dtype: str, tmp_path: Any) -> None:
    source = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(getattr(torch, dtype))
    save(tmp_path / "w", torch_neutral.to_neutral(source))
    tensors, _ = load(tmp_path / "w")
    assert {array.dtype.name for array in tensors.values()} == {dtype}
    rngs = nnx.Rngs(0)
    narrow = jnp.dtype(dtype)
    layer = nnx.Sequential(
        nnx.Linear(3, 4, param_dtype=narrow, rngs=rngs), nnx.LayerNorm(4, param_dtype=narrow, rngs=rngs)
    )
    jax_neutral.from_neutral(layer, tensors)
    assert_same(jax_neutral.to_neutral(layer), tensors)
    target = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(getattr(torch, dtype))
    torch_neutral.from_neutral(target, jax_neutral.to_neutral(layer))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_attention_with_sources_of_other_widths() -> None:
    attention = nn.MultiheadAttention(6, 2, kdim=4, vdim=5, add_bias_kv=True)
    tensors = torch_neutral.to_neutral(attention)
    assert {name: array.shape for name, array in tensors.items() if "weight" in name} == {
        "query.weight": (6, 6),
        "key.weight": (6, 4),
        "value.weight": (6, 5),
        "out.weight": (6, 6),
    }
    assert {"bias_k", "bias_v"} <= set(tensors)


@pytest.mark.parametrize("stacked", ["nnx.vmap", "nn.scan"])
def test_stacked_layers_keep_their_leading_axis(stacked: str) -> None:
    x = np.ones((2, 6), np.float32)
    if stacked == "nnx.vmap":
        make = nnx.vmap(lambda rngs: nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs))
        tensors = jax_neutral.to_neutral(make(nnx.Rngs(0).split(3)))
        one = jax_neutral.to_neutral(nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0)))
    else:

        class Body(linen.Module):
            @linen.compact
            def __call__(self, x: Any, _: Any) -> Any:
                return linen.MultiHeadDotProductAttention(2, name="attn")(x[None])[0], None

        scanned = linen.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="body")
        variables = scanned.init(jax.random.key(0), x, None)
        layers = jax_neutral.linen_layers(scanned, x, None)
        tensors = jax_neutral.to_neutral(variables, layers=layers)
        back = jax_neutral.from_neutral(variables, tensors, layers=layers)
        jax.tree.map(np.testing.assert_array_equal, back, variables)
        body = Body()
        apart = body.init(jax.random.key(0), x, None)
        one = jax_neutral.to_neutral(apart, layers=jax_neutral.linen_layers(body, x, None))
    assert {name: array.shape for name, array in tensors.items()} == {n: (3, *a.shape) for n, a in one.items()}
