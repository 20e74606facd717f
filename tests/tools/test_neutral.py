"""The neutral form of whole models: names, gradients, and what is refused and stays unchanged then."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from tests.helpers import assert_close, tree_error
from tests.tools.neutral_models import (
    TOKENS,
    TorchModel,
    linen_variables,
    nnx_gradients,
    nnx_loss,
    nnx_model,
    torch_loss,
)

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from flax import linen, nnx  # noqa: E402
from torch import nn  # noqa: E402

import revcore  # noqa: E402
from revcore_jax import neutral as jax_neutral  # noqa: E402
from revcore_torch import neutral as torch_neutral  # noqa: E402

pytestmark = pytest.mark.usefixtures("quickly_compiled_module")


def test_names_are_torchs_in_every_library() -> None:
    names = sorted(torch_neutral.to_neutral(TorchModel()))
    assert "body.1.attn.query.weight" in names
    assert "body.0.mlp.2.bias" in names
    assert "heads.1.weight" in names
    assert names == sorted(jax_neutral.to_neutral(nnx_model()))
    _, variables, layers = linen_variables()
    assert names == sorted(jax_neutral.to_neutral(variables, layers=layers))


def test_a_whole_model_gives_the_same_loss_and_gradients() -> None:
    source, target = TorchModel(), nnx_model()
    source.heads[1].requires_grad_(False)  # not used: it has no gradient, and may lack one
    tensors = torch_neutral.to_neutral(source)
    jax_neutral.from_neutral(target, tensors)
    loss = torch_loss(source)
    loss.backward()
    assert tree_error(nnx.jit(nnx_loss)(target), loss) < 1e-6
    gradients = torch_neutral.to_neutral(source, gradients=True)
    assert not [name for name in gradients if name.startswith("heads.1")]
    theirs = jax_neutral.to_neutral(target, nnx_gradients(target))
    theirs = {name: array for name, array in theirs.items() if not name.startswith("heads.1")}
    assert_close(theirs, gradients, dtype="float32", depth=2)

    model, variables, layers = linen_variables()
    variables = jax_neutral.from_neutral(variables, tensors, layers=layers)
    assert tree_error((jax.jit(model.apply)(variables, TOKENS) ** 2).mean(), loss) < 1e-6  # type: ignore[operator]


def test_gradients_as_a_mapping() -> None:
    model = TorchModel().requires_grad_(True)
    parameters = dict(model.named_parameters())
    grads = torch.func.grad(lambda p: (torch.func.functional_call(model, p, torch.from_numpy(TOKENS)) ** 2).mean())(
        parameters
    )
    torch_loss(model).backward()
    model.heads[1].weight.grad, model.heads[1].bias.grad = torch.zeros(2, 4), torch.zeros(2)
    assert_close(
        torch_neutral.to_neutral(model, grads), torch_neutral.to_neutral(model, gradients=True), dtype="float32"
    )
    for bad, message in (
        ({**grads, "nothing": torch.ones(1)}, "'nothing' came with shape .* no parameter of the module"),
        ({**grads, "embed.weight": torch.ones(1)}, r"'embed.weight' came with shape \(1,\), expected \(7, 4\)"),
        ({}, "embed.weight has no gradient"),
        (3, "gradients came as int"),
    ):
        with pytest.raises(revcore.SpecError, match=message):
            torch_neutral.to_neutral(model, bad)  # type: ignore[arg-type]


def snapshot(model: Any) -> Any:
    if isinstance(model, nn.Module):
        return {name: tensor.clone().numpy() for name, tensor in model.state_dict().items()}
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("backend", ["torch", "nnx", "linen"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("body.1.gain"), "missing body.1.gain"),
        (lambda t: t.update(extra=np.ones(1)), "unexpected extra"),
        (lambda t: t.update({"body.0.mlp.0.weight": np.ones((4, 6))}), r"shape \(4, 6\), expected \(6, 4\)"),
        (lambda t: t.update({"body.0.attn.out.weight": np.ones((2, 2, 4))}), r"shape \(2, 2, 4\), expected \(4, 4\)"),
        (lambda t: t.update({"heads.0.bias": np.arange(7)}), "came as int64, expected .*float32 or another float"),
        (lambda t: t.update({"heads.0.bias": np.ones(7, complex)}), "came as complex128, expected .*float32"),
    ],
    ids=["missing", "unexpected", "transposed", "heads", "integer", "complex"],
)
def test_wrong_tensors_change_nothing(backend: str, change: Any, message: str) -> None:
    tensors = {name: array + 1 for name, array in torch_neutral.to_neutral(TorchModel()).items()}
    change(tensors)
    if backend == "linen":
        _, variables, layers = linen_variables()
        with pytest.raises(revcore.SpecError, match=message):
            jax_neutral.from_neutral(variables, tensors, layers=layers)
        return
    model: Any = TorchModel() if backend == "torch" else nnx_model()
    before = snapshot(model)
    with pytest.raises(revcore.SpecError, match=f"{message}.*Nothing was changed"):
        (torch_neutral if backend == "torch" else jax_neutral).from_neutral(model, tensors)
    jax.tree.map(np.testing.assert_array_equal, snapshot(model), before)


def test_the_target_keeps_its_dtype_and_objects() -> None:
    wide = {name: array.astype(np.float64) for name, array in torch_neutral.to_neutral(TorchModel()).items()}
    model, other = TorchModel(), nnx_model()
    weight, variable = model.embed.weight, other.embed.embedding
    torch_neutral.from_neutral(model, wide)
    jax_neutral.from_neutral(other, wide)
    assert model.embed.weight is weight
    assert other.embed.embedding is variable
    assert weight.dtype == torch.float32
    assert variable.get_value().dtype == jnp.float32
    np.testing.assert_array_equal(weight.detach().numpy(), np.asarray(variable.get_value()))


def test_the_target_keeps_its_place_on_a_mesh() -> None:
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    there = jax.sharding.NamedSharding(jax.make_mesh((1,), ("cut",)), jax.sharding.PartitionSpec("cut"))
    variable = model.kernel
    variable.set_value(jax.device_put(variable.get_value(), there))
    jax_neutral.from_neutral(model, jax_neutral.to_neutral(model))
    assert variable.get_value().sharding == there


def test_the_neutral_form_is_a_copy() -> None:
    model = nn.Linear(2, 2)
    tensors = torch_neutral.to_neutral(model)
    before = {name: array.copy() for name, array in tensors.items()}
    with torch.no_grad():
        model.weight.zero_()
    np.testing.assert_array_equal(tensors["weight"], before["weight"])
    torch_neutral.from_neutral(model, tensors)
    tensors["weight"][:] = 0
    np.testing.assert_array_equal(model.weight.detach().numpy(), before["weight"])


def test_shared_parameters_appear_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

    class Shared(nnx.Module):
        def __init__(self) -> None:
            self.z = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.a = self.z

        def __call__(self, x: Any) -> Any:
            return self.z(self.a(x))

    class TorchShared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Linear(2, 2)
            self.a = self.z

        def forward(self, x: Any) -> Any:
            return self.z(self.a(x))

    assert list(torch_neutral.to_neutral(Tied())) == ["embed.weight"]
    shared, source = Shared(), TorchShared()
    jax_neutral.from_neutral(shared, torch_neutral.to_neutral(source))
    grads = nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(shared)
    source(torch.ones(1, 2)).sum().backward()
    expected = torch_neutral.to_neutral(source, gradients=True)
    assert_close(jax_neutral.to_neutral(shared, grads), expected, dtype="float32")
    assert sorted(jax_neutral.to_neutral(shared)) == sorted(expected) == ["a.bias", "a.weight"]
    named = {name: parameter.grad for name, parameter in source.named_parameters()}
    assert list(named) == ["z.weight", "z.bias"]
    assert_close(torch_neutral.to_neutral(source, named), expected)  # type: ignore[arg-type]


def test_unknown_layers_are_never_transposed() -> None:
    class TorchOwn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.arange(6.0).reshape(2, 3))
            self.register_buffer("table", torch.arange(3))
            self.register_buffer("scratch", torch.zeros(1), persistent=False)

    class NnxOwn(nnx.Module):
        def __init__(self) -> None:
            self.kernel = nnx.Param(jnp.arange(6.0).reshape(2, 3))
            self.table = nnx.Variable(jnp.arange(3, dtype=jnp.int32))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    tensors = torch_neutral.to_neutral(TorchOwn())
    theirs = jax_neutral.to_neutral(NnxOwn())
    assert sorted(tensors) == sorted(theirs) == ["kernel", "table"]
    np.testing.assert_array_equal(tensors["kernel"], theirs["kernel"])
    jax_neutral.from_neutral(NnxOwn(), tensors)

    einsum = nnx.Einsum("ab,bc->ac", (2, 3), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(jax_neutral.to_neutral(einsum)["kernel"], einsum.kernel.get_value())
    batched = nnx.LinearGeneral(2, 3, batch_axis={0: 4}, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(jax_neutral.to_neutral(batched)["kernel"], batched.kernel.get_value())

    class LinenOwn(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            kernel = self.param("kernel", lambda key: jnp.arange(6.0).reshape(2, 3))
            return x @ kernel @ self.param("scale", lambda key: jnp.ones(3))

    x = jnp.ones((1, 2))
    variables = LinenOwn().init(jax.random.key(0), x)
    for layers in (None, jax_neutral.linen_layers(LinenOwn(), x)):
        tensors = jax_neutral.to_neutral(variables, layers=layers)
        assert sorted(tensors) == ["kernel", "scale"]
        np.testing.assert_array_equal(tensors["kernel"], variables["params"]["kernel"])


def test_linen_autonames_need_no_module() -> None:
    class Auto(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(2)(linen.Conv(3, (2, 2))(x))

    x = jnp.ones((1, 4, 4, 2))
    variables = Auto().init(jax.random.key(0), x)
    plain = jax_neutral.to_neutral(variables)
    exact = jax_neutral.to_neutral(variables, layers=jax_neutral.linen_layers(Auto(), x))
    assert plain["Conv_0.weight"].shape == (3, 2, 2, 2)
    assert plain.keys() == exact.keys()
    assert all(np.array_equal(plain[name], exact[name]) for name in plain)


def test_linen_boxes_and_other_collections_are_kept() -> None:
    init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "model"))
    variables = linen.Dense(3, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 2)))
    variables = {**variables, "cache": {"index": jnp.zeros((), jnp.int32)}}
    tensors = {name: array + 1 for name, array in jax_neutral.to_neutral(variables).items()}
    assert sorted(tensors) == ["bias", "weight"]
    filled = jax_neutral.from_neutral(variables, tensors)
    assert jax.tree.structure(filled) == jax.tree.structure(variables)
    np.testing.assert_array_equal(filled["params"]["kernel"].unbox(), tensors["weight"].T)


@pytest.mark.parametrize("neutral", [torch_neutral, jax_neutral])
def test_not_a_module(neutral: Any) -> None:
    for thing in ({"kernel": 1}, None, "model"):
        for call in (
            lambda thing=thing: neutral.to_neutral(thing),
            lambda thing=thing: neutral.from_neutral(thing, {}),
        ):
            with pytest.raises(revcore.SpecError, match="module came as"):
                call()


def test_two_tensors_of_one_name() -> None:
    class Clash(nn.Module):
        neutral_transparent: ClassVar = ("layers",)

        def __init__(self) -> None:
            super().__init__()
            self.layers, self.weight = nn.Linear(2, 2), nn.Parameter(torch.ones(2))

    with pytest.raises(revcore.SpecError, match="two tensors have the name 'weight'"):
        torch_neutral.to_neutral(Clash())


def test_compiled_and_meta_modules() -> None:
    model = nn.Linear(2, 2)
    assert list(torch_neutral.to_neutral(torch.compile(model, backend="eager"))) == ["weight", "bias"]  # type: ignore[arg-type]
    with pytest.raises(revcore.SpecError, match="meta device"):
        torch_neutral.from_neutral(nn.Linear(2, 2, device="meta"), torch_neutral.to_neutral(model))


def test_num_batches_tracked_only_where_it_has_a_say() -> None:
    assert "num_batches_tracked" not in torch_neutral.to_neutral(nn.BatchNorm1d(2))
    cumulative = nn.BatchNorm1d(2, momentum=None)  # type: ignore[arg-type]
    cumulative(torch.randn(3, 2))
    tensors = torch_neutral.to_neutral(cumulative)
    assert tensors["num_batches_tracked"] == 1
    fresh = nn.BatchNorm1d(2, momentum=None)  # type: ignore[arg-type]
    torch_neutral.from_neutral(fresh, tensors)
    assert int(fresh.num_batches_tracked) == 1  # type: ignore[arg-type]


def test_weights_go_from_framework_to_framework_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """By DLPack, both ways, bit for bit, with nothing brought to the host, into memory of their own."""
    expected = torch_neutral.to_neutral(source := TorchModel())
    target = nnx_model()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an array was copied to the host")

    with monkeypatch.context() as patch:
        for name in ("cpu", "numpy", "__array__"):
            patch.setattr(torch.Tensor, name, refuse)
        patch.setattr("revcore_jax.neutral.to_numpy", refuse)
        with pytest.raises(AssertionError, match="copied to the host"):
            torch_neutral.to_neutral(source)
        jax_neutral.from_neutral(target, torch_neutral.to_neutral(source, host=False))
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.zero_()
        there = jax_neutral.to_neutral(target, host=False)
        assert all(isinstance(array, jax.Array) for array in there.values())
        torch_neutral.from_neutral(source, there)
    for tensors in (jax_neutral.to_neutral(target), torch_neutral.to_neutral(source)):
        assert sorted(tensors) == sorted(expected)
        for name, array in tensors.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_torchs_64_bits_are_not_halved_on_their_way_into_jax() -> None:
    assert not jax.config.jax_enable_x64
    source = nn.Linear(3, 2).double()
    with jax.enable_x64(True):
        target = nnx.Linear(3, 2, param_dtype=np.float64, rngs=nnx.Rngs(0))
    jax_neutral.from_neutral(target, torch_neutral.to_neutral(source, host=False))
    np.testing.assert_array_equal(jax_neutral.to_neutral(target)["weight"], source.weight.detach().numpy())


def test_blocks_are_stacked_and_parted_on_their_device() -> None:
    from revcore.weights import stack, unstack

    program = revcore.Program([revcore.Repeat(revcore.Repeat(revcore.Couple(0, 1), 2), 3)])
    apart = {
        f"{i}.{name}": array for i in range(6) for name, array in {"w": np.full((2, 2), i), "b": np.full((), i)}.items()
    }
    for make, kind in ((torch.from_numpy, torch.Tensor), (jnp.asarray, jax.Array), (np.asarray, np.ndarray)):
        stacked = stack({name: make(array) for name, array in apart.items()}, program)
        assert {name: tuple(array.shape) for name, array in stacked.items()} == {"0.w": (3, 2, 2, 2), "0.b": (3, 2)}
        parted = unstack(stacked, program)
        assert all(isinstance(array, kind) for array in (*stacked.values(), *parted.values()))
        assert sorted(parted) == sorted(apart)
        for name, array in apart.items():
            np.testing.assert_array_equal(np.asarray(parted[name]), array)
