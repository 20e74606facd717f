"""The model as an object: copied, stored, cut, moved; and its likeness to ``nn.Sequential``."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

import revcore
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, StoreAll, reversible
from tests.plain.pytorch import Plain
from tests.torch.harness import WIDTH, block, dropout_block, make_input, train
from tests.torch.registry import Section

objects = Section("The model as an object")


@objects.same("`copy.deepcopy`")
def test_deepcopy(model):
    clone = copy.deepcopy(model)
    return train(clone), [p.grad for p in clone.parameters()], [p.grad for p in model.parameters()]


@objects.same("`copy.deepcopy` between a forward pass and its backward")
def test_deepcopy_with_a_graph_alive(model):
    x = make_input()
    y = model(x)
    clone = copy.deepcopy(model)
    y.sum().backward()
    return x.grad, train(clone), [p.grad for p in clone.parameters()]


@objects.same("`copy.deepcopy` of a trained model, and one by `AveragedModel` (EMA)")
def test_averaged_model(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        train(model)
        optimizer.step()
        average.update_parameters(model)
    return train(average)


@objects.same("`pickle`")
def test_pickle(model):
    clone = pickle.loads(pickle.dumps(model))
    return train(clone), [p.grad for p in clone.parameters()]


@objects.same("`pickle` between a forward pass and its backward")
def test_pickle_with_a_graph_alive(model):
    x = make_input()
    loss = model(x).pow(2).sum()
    clone = pickle.loads(pickle.dumps(model))
    loss.backward()
    return x.grad, train(clone)


@objects.same("`torch.save` and `torch.load` of the whole model")
def test_save_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return train(torch.load(file, weights_only=False))


@objects.same("`state_dict` stored, and loaded into a fresh model")
def test_state_dict_round_trip(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    clone = copy.deepcopy(model)
    for p in clone.parameters():
        nn.init.zeros_(p)
    clone.load_state_dict(torch.load(file, weights_only=True))
    return train(clone), list(model.state_dict())


@objects.works("`state_dict` keys are those of `nn.Sequential`, under every policy")
def test_state_dict_keys():
    blocks = [block() for _ in range(3)]
    sequential = nn.Sequential(*blocks)
    for policy in (Reverse(), StoreAll(), Checkpoint()):
        model = ReversibleSequential(*blocks, policy=policy)
        assert list(model.state_dict()) == list(sequential.state_dict())
        model.load_state_dict(sequential.state_dict())
        sequential.load_state_dict(model.state_dict())
    named = ReversibleSequential(OrderedDict(attention=blocks[0], mlp=blocks[1]))
    assert list(named._modules) == ["attention", "mlp"]


@objects.same("weights loaded between two training steps (`load_state_dict`)")
def test_load_between_steps(model):
    before = copy.deepcopy(model.state_dict())
    train(model)
    model.load_state_dict({k: 0.5 * v for k, v in before.items()})
    return train(model)


@objects.same("`load_state_dict(assign=True)`: parameters are other objects afterwards")
def test_load_with_assign(model):
    train(model)
    model.load_state_dict({k: (0.5 * v).clone() for k, v in model.state_dict().items()}, assign=True)
    return train(model)


@objects.refuses(
    "weights loaded between a forward pass and its backward",
    revcore.InversionError,
    "its parameters were changed in place after the forward pass",
)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_load_before_backward(refused, policy):
    model = ReversibleSequential(block(), block(), policy=policy).double()
    loss = model(make_input()).pow(2).sum()
    model.load_state_dict({k: 0.5 * v for k, v in model.state_dict().items()})
    with refused:
        loss.backward()


@objects.same("`model.to(dtype)`, `.double()`, `.half()` between steps")
def test_other_dtype(model):
    train(model)
    model.zero_grad()
    x = make_input().detach().float().requires_grad_()
    model.float()(x).pow(2).sum().backward()
    model.double().zero_grad()  # float32 gradients agree to float32's rounding only
    return train(model)


@objects.same("a slice (`model[1:4]`)")
def test_slice(model):
    return train(model[1:4])


def test_slices_keep_each_blocks_coupling() -> None:
    """Cut where the list of couplings is not at its beginning, the halves are still the whole."""
    couplings = [revcore.Momentum(beta) for beta in (0.9, 0.8, 0.7)]
    whole, x = ReversibleSequential(*[block() for _ in range(5)], coupling=couplings).double(), make_input()
    for cut in range(1, 5):
        torch.testing.assert_close(whole[cut:](whole[:cut](x)), whole(x), rtol=1e-14, atol=1e-14)


def test_a_slice_keeps_the_policy() -> None:
    assert ReversibleSequential(block(), block(), policy=Checkpoint())[1:].policy == Checkpoint()


@objects.same("`append`, `insert`, `extend`, `del`, `pop`, and a block replaced")
def test_edited(model):
    torch.manual_seed(3)
    model.append(block().double())
    model.insert(0, dropout_block().double())
    model.extend([block().double()])
    del model[1]
    model.pop(2)
    model[1] = block().double()
    return train(model), len(model)


@objects.same("iteration, `len`, `in`, names, `children`")
def test_as_a_container(model):
    assert model[0] in list(model)
    return train(model), len(model), [n for n, _ in model.named_children()], [n for n, _ in model.named_parameters()]


@objects.same("`apply`, `requires_grad_`, `zero_grad`, `named_modules`")
def test_module_methods(model):
    model.apply(lambda m: nn.init.constant_(m.weight, 0.1) if isinstance(m, nn.Linear) else None)
    model.requires_grad_(False).requires_grad_(True)
    results = train(model)
    model.zero_grad()
    return results, [n for n, _ in model.named_modules()]


@objects.same("inside another module, between other layers")
def test_inside_another_module(model):
    torch.manual_seed(3)
    whole = nn.Sequential(nn.Linear(3, 2 * WIDTH), model, nn.Linear(2 * WIDTH, 1)).double()
    x = torch.ones(4, 3, dtype=torch.float64)
    whole(x).pow(2).sum().backward()
    return [p.grad for p in whole.parameters()]


@objects.same("several models one after the other")
def test_models_in_a_row(model):
    other = copy.deepcopy(model)
    x = make_input()
    other(model(x).sin()).pow(2).sum().backward()
    return x.grad, [p.grad for p in other.parameters()]


@objects.works("`model.policy` is set to another between two steps")
def test_policy_set():
    torch.manual_seed(0)
    model = ReversibleSequential(*[block() for _ in range(4)]).double()
    plain = train(Plain(*copy.deepcopy(list(model))))
    for policy in (Reverse(), StoreAll(), Checkpoint(2), Reverse(anchor_every=1)):
        model.policy = policy
        for got, expected in zip(train(model), plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@objects.works("`model.policy` is set between a forward pass and its backward", note="the graph is what it was")
def test_policy_set_before_backward():
    model = ReversibleSequential(*[block() for _ in range(4)]).double()
    x = make_input()
    (expected,) = torch.autograd.grad(model(x).pow(2).sum(), x)
    loss = model(x).pow(2).sum()
    model.policy = StoreAll()
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@objects.works("a block is replaced between a forward pass and its backward", note="the graph is what it was")
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_block_replaced_before_backward(policy):
    model = ReversibleSequential(*[block() for _ in range(4)], policy=policy).double()
    x = make_input()
    (expected,) = torch.autograd.grad(model(x).pow(2).sum(), x)
    loss = model(x).pow(2).sum()
    model[1] = block().double()
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@objects.refuses(
    "a layer inside a block is replaced between a forward pass and its backward",
    revcore.InversionError,
    "its parameters are other objects than in the forward pass",
)
def test_layer_replaced_before_backward(refused):
    model = ReversibleSequential(*[block() for _ in range(2)]).double()
    loss = model(make_input()).pow(2).sum()
    model[1][0] = nn.Linear(WIDTH, WIDTH).double()
    with refused:
        loss.backward()


# --- streams and the inverse ------------------------------------------------------------------------------------------

streams = Section("Streams and the inverse")


@streams.works("the sequence of half residuals and swaps, written out")
def test_the_sequence_of_streams():
    """Half residual and swap: y = (x1, x0 + f(x1)) a step, so n steps rotate by n."""
    x0, x1 = make_input().detach().chunk(2, 1)
    y0 = x0 + torch.sin(x1)
    y1 = x1 + torch.cos(y0)
    y2 = y0 + torch.tanh(y1)
    assert torch.equal(torch.cat(functions(torch.sin, torch.cos, torch.tanh)), torch.cat((y1, y2)))
    assert torch.equal(torch.cat(functions(torch.sin, torch.cos)), torch.cat((y0, y1)))


def functions(*blocks):
    return reversible(revcore.revnet(len(blocks)), blocks, make_input().detach().chunk(2, 1))


@streams.works("`model.inverse(model(x))` is `x`, for any `split_dim`")
@pytest.mark.parametrize(("split_dim", "num_streams"), [(1, 2), (-1, 2), (0, 2), (1, 3)])
def test_inverse(split_dim, num_streams):
    x = make_input().detach()
    width = 2 * WIDTH // num_streams if split_dim else 2 * WIDTH
    blocks = [block(width) for _ in range(5)]
    model = ReversibleSequential(*blocks, split_dim=split_dim, num_streams=num_streams).double().eval()
    assert (model.inverse(model(x)) - x).norm() <= 1e-14 * x.norm()


@streams.works("a gradient through `inverse`")
def test_gradient_through_the_inverse():
    model = ReversibleSequential(*[block() for _ in range(3)]).double()
    assert torch.autograd.gradcheck(lambda y: model.inverse(y), make_input(rows=1))


@streams.works("`split_dim=None`: every stream gets the input, and the output is their mean")
def test_copied_input():
    model = ReversibleSequential(block(), block(), block(), split_dim=None).double()
    x = make_input().detach()[:, :WIDTH]
    both = reversible(model.program, list(model), (x, x))
    assert torch.equal(model(x), (both[0] + both[1]) / 2)


@streams.refuses(
    "`inverse` where the streams were averaged", revcore.SpecError, "inverse needs streams made by 'chunk'"
)
def test_inverse_of_a_mean(refused):
    model = ReversibleSequential(block(), block(), split_dim=None).double()
    with refused:
        model.inverse(make_input().detach()[:, :WIDTH])


@streams.works(
    "the last stream alone as output, changed in place", note="`program.merge = 'last'`: an error, as for streams"
)
def test_last_stream_as_output():
    program = revcore.Program(revcore.revnet(2).steps, merge="last")
    model = ReversibleSequential(block(), block(), program=program).double()
    y = model(make_input())
    assert y.shape == (4, WIDTH)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        y.relu_()
