"""Adam's state goes on in either framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers import tree_error
from tests.tools.neutral_models import (
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
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from torch import nn  # noqa: E402

import revcore  # noqa: E402
from revcore_jax import neutral as jax_neutral  # noqa: E402
from revcore_torch import neutral as torch_neutral  # noqa: E402

pytestmark = pytest.mark.usefixtures("quickly_compiled_module")


def used(model: Any) -> Any:
    """The model without its second head, which the loss does not use."""
    if isinstance(model, nn.Module):
        model.heads = nn.ModuleList([model.heads[0]])  # type: ignore[index]
    else:
        model.heads = nnx.List([model.heads[0]])
    return model


@pytest.mark.parametrize("wrapped", [True, False], ids=["nnx.Optimizer", "optax"])
def test_training_goes_on_in_either_framework(wrapped: bool) -> None:
    """Two steps here, the state carried over, one step on either side; and the state goes back exact."""
    source, target = used(TorchModel()), used(nnx_model())
    # eps: where a gradient is all rounding, a step that divides by it is any number, in every framework another
    adam = torch.optim.AdamW(source.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-4)

    def step() -> None:
        adam.zero_grad()
        torch_loss(source).backward()
        adam.step()

    step()
    step()
    state = torch_neutral.optimizer_to_neutral(source, adam)
    assert state["step"] == 2
    tensors = torch_neutral.to_neutral(source)

    jax_neutral.from_neutral(target, tensors)
    schedule = optax.adamw(lambda count: jnp.where(count == 2, 1e-2, jnp.nan), eps=1e-4, weight_decay=0.1)
    params = nnx.state(target, nnx.Param)
    if wrapped:
        optimizer = nnx.Optimizer(target, schedule, wrt=nnx.Param)
        jax_neutral.optimizer_from_neutral(target, optimizer, state)
        assert optimizer.step.get_value() == 2
        back = jax_neutral.optimizer_to_neutral(target, optimizer)
        nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.grad(nnx_loss)(model)))(target, optimizer)
    else:
        moments = jax_neutral.optimizer_from_neutral(target, schedule.init(params), state)
        back = jax_neutral.optimizer_to_neutral(target, moments)
        updates, _ = jax.jit(schedule.update)(nnx_gradients(target), moments, params)
        nnx.update(target, optax.apply_updates(params, updates))
    assert sorted(back) == sorted(state)
    assert all(np.array_equal(back[name], state[name]) for name in state)
    step()
    before, after = (torch_neutral.to_neutral(source), jax_neutral.to_neutral(target))
    moved = {name: before[name] - tensors[name] for name in tensors}
    theirs = {name: after[name] - tensors[name] for name in tensors}
    assert tree_error(theirs, moved) < 1e-3  # of the step itself, which divides by small second moments

    fresh = used(TorchModel())
    new = torch.optim.AdamW(fresh.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-4)
    torch_neutral.from_neutral(fresh, tensors)
    torch_neutral.optimizer_from_neutral(fresh, new, back)
    torch_loss(fresh).backward()
    new.step()
    for name, array in torch_neutral.to_neutral(fresh).items():
        np.testing.assert_array_equal(array, before[name])


def test_linen_moments() -> None:
    _, variables, layers = linen_variables()
    state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(variables["params"])
    tensors = jax_neutral.optimizer_to_neutral(variables, state, layers=layers)
    model = TorchModel()
    adam = torch.optim.Adam(model.parameters())
    assert sorted(tensors) == sorted(torch_neutral.optimizer_to_neutral(model, adam))
    changed = {name: array + 1 for name, array in tensors.items()}
    filled = jax_neutral.optimizer_from_neutral(variables, state, changed, layers=layers)
    back = jax_neutral.optimizer_to_neutral(variables, filled, layers=layers)
    assert all(np.array_equal(back[name], changed[name]) for name in changed)


def test_optimizers_that_are_not_adam() -> None:
    model, other = nn.Linear(2, 2), nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    model(torch.ones(1, 2)).sum().backward()
    for optimizer in (
        torch.optim.SGD(model.parameters(), momentum=0.9),
        torch.optim.Adam(model.parameters(), amsgrad=True),
    ):
        optimizer.step()
        with pytest.raises(revcore.SpecError, match="expected step, exp_avg and exp_avg_sq"):
            torch_neutral.optimizer_to_neutral(model, optimizer)
    with pytest.raises(revcore.SpecError, match="state holds 0 Adam states"):
        jax_neutral.optimizer_to_neutral(other, optax.sgd(1e-3, momentum=0.9).init(nnx.state(other, nnx.Param)))
    with pytest.raises(revcore.SpecError, match="not the module's"):
        torch_neutral.optimizer_to_neutral(nn.Linear(2, 2), torch.optim.Adam(model.parameters()))
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(revcore.SpecError, match=r"missing first\.weight"):
        torch_neutral.optimizer_from_neutral(model, adam, {"step": np.array(1)})
    assert not adam.state
