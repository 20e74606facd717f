"""Blocks that a tensor-parallel plan parts between ranks (``DTensor``): the run of one process."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from revcore.errors import InversionError
from revcore_torch import Checkpoint, Reverse, ReversibleSequential
from tests.distributed.networks import (
    MLP,
    WIDTH,
    assert_close,
    batches,
    distance,
    loss_of,
    values_of,
)
from tests.distributed.ranks import Cases, init_gloo
from tests.distributed.sharding import events, gradients, train, whole, wholes
from tests.distributed.tensor_parallel import DEPTH, mesh, network, parallel
from tests.plain.pytorch import Plain

if TYPE_CHECKING or __name__ == "__main__":
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

CASES = Cases(world=2)


def parted(net: nn.Module) -> int:
    """Return how many parameters a rank holds a part of."""
    placements = [p.placements for p in net.parameters() if isinstance(p, DTensor)]
    return sum(any(isinstance(where, Shard) for where in by_dimension) for by_dimension in placements)


def frozen(net: Any) -> Any:
    for i in (0, 3):
        net.blocks[i].requires_grad_(False)
    return net


def equals_one_process(
    name: str, sequence: bool = False, change: Any = lambda net: net, tied: bool = False, **settings: Any
) -> None:
    def case(rank: int, world: int) -> None:
        alone = change(network(reversible=False, tied=tied))
        model = parallel(change(network(tied=tied, **settings)), mesh()["tensor"], sequence)
        assert parted(model) >= 3 * DEPTH
        losses = train(alone, batches())
        train(model, batches())
        assert losses[0] != losses[-1]
        assert_close(wholes(model), values_of(alone))

    CASES.add(name, case)


equals_one_process("columns, then rows")
equals_one_process("the same, checkpointed", policy=Checkpoint())
equals_one_process("frozen blocks", change=frozen)
equals_one_process("the head is the embedding", tied=True)
equals_one_process("streams parted along the sequence", sequence=True)


@CASES
def dropout(rank: int, world: int) -> None:
    def trained(**settings: Any) -> dict[str, Tensor]:
        model = parallel(network(p=0.5, **settings), mesh()["tensor"])
        torch.manual_seed(2)
        train(model, batches())
        return wholes(model)

    ours, again, plain = trained(), trained(), trained(reversible=False)
    assert all(torch.equal(value, again[name]) for name, value in ours.items())
    assert_close(ours, plain)
    alone = network(reversible=False)
    train(alone, batches())
    assert distance(ours, values_of(alone)) > 1e-3  # it dropped something


@CASES
def collectives(rank: int, world: int) -> None:
    found = []
    for settings in ({"reversible": False}, {}):
        model = parallel(network(**settings), mesh()["tensor"])
        with events(list(model.blocks)) as log:
            loss = loss_of(model, batches()[0])
            forward = log.count("sum")
            loss.backward()
        found.append((forward, log.count("sum")))
    (plain_forward, plain), (forward, ours) = found
    assert forward == plain_forward == DEPTH  # of the rows' sums
    assert ours == plain + DEPTH  # they are summed again as the blocks run again


@CASES
def weights_changed_before_the_backward_pass(rank: int, world: int) -> None:
    for foreach in (False, True):
        model = parallel(network(), mesh()["tensor"])
        parameters = [p for p in model.parameters() if isinstance(p, DTensor)]
        optimizer = torch.optim.SGD(parameters, lr=0.1, foreach=foreach)
        loss_of(model, batches()[0]).backward()
        loss = loss_of(model, batches()[0])
        optimizer.step()
        with pytest.raises(InversionError, match=r"parameters were changed in place after the forward pass"):
            loss.backward()


@CASES
def streams_that_are_parted_themselves(rank: int, world: int) -> None:
    over = mesh()["tensor"]

    def run(kind: Any, place: Any, turned: bool, **settings: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        body = kind(*[MLP() for _ in range(DEPTH)], **settings).double()
        distribute_module(body, over)
        x = torch.randn(4, 6, 2 * WIDTH, dtype=torch.float64)
        x = distribute_tensor(x, over, [place]).requires_grad_()
        y = body(x.transpose(0, 1) if turned else x)
        assert isinstance(y, DTensor)
        y.square().sum().backward()
        assert x.grad is not None
        return {"x": whole(x.grad), **gradients(body)}

    for place, turned in ((Replicate(), False), (Shard(0), True), (Shard(1), True), (Shard(2), False)):
        plain = run(Plain, place, turned, split_dim=-1)
        for policy in (Reverse(), Checkpoint()):
            assert_close(run(ReversibleSequential, place, turned, split_dim=-1, policy=policy), plain)


outcomes, test_on_two_ranks = CASES.tests(__file__)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "this program of .* steps, run back in")
    CASES.run(lambda: (init_gloo(), mesh()))
