"""``DistributedDataParallel`` around a reversible network: no special code, and the run of one process."""

from __future__ import annotations

import pytest
from networks import Transformer, adamw, assert_close, batches, loss_of, part_of, train_alone, values_of
from ranks import Cases, Outcomes
from torch.nn.parallel import DistributedDataParallel

CASES = Cases(world=2)


@CASES
def plain_ddp(rank: int, world: int) -> None:
    alone = Transformer(reversible=False).double()
    losses = train_alone(alone, batches())
    model = DistributedDataParallel(Transformer().double())
    optimizer = adamw(model.parameters())
    for batch in batches():
        optimizer.zero_grad()
        loss_of(model, part_of(batch, rank, world)).backward()
        optimizer.step()
    assert losses[0] != losses[-1]
    assert_close(values_of(model.module), values_of(alone))


outcomes = CASES.fixture(__file__)
pytestmark = CASES.mark(__file__)


@pytest.mark.parametrize("name", CASES)
def test_on_two_ranks(name: str, outcomes: Outcomes) -> None:
    outcomes.check(name)


if __name__ == "__main__":
    CASES.run()
