"""FSDP2 on two dimensions of ranks: over tensor-parallel blocks, over replicas, sharded again among half of them."""

from __future__ import annotations

import warnings

from tests.distributed.left import groups_of_its_own
from tests.distributed.networks import assert_close, batches, values_of
from tests.distributed.ranks import Cases, init_gloo
from tests.distributed.sharding import VIEW, shard, train, wholes
from tests.distributed.tensor_parallel import mesh, network, parallel

CASES = Cases(world=4)


@CASES
def with_fsdp2(rank: int, world: int) -> None:
    both = mesh()
    alone, model = network(reversible=False), parallel(network(), both["tensor"])
    shard(model, mesh=both["data"])
    train(alone, batches())
    train(model, batches(), rank // 2, 2)
    assert_close(wholes(model), values_of(alone))


@CASES
def replicas_that_are_sharded(rank: int, world: int) -> None:
    alone, model = network(reversible=False), shard(network(), mesh=mesh())
    train(alone, batches())
    train(model, batches(), rank, world)
    assert_close(wholes(model), values_of(alone))


@CASES
@groups_of_its_own()
def resharded_to_two_of_four(rank: int, world: int) -> None:
    alone, model = network(reversible=False), shard(network(), reshard_after_forward=2)
    train(alone, batches())
    train(model, batches(), rank, world)
    assert_close(wholes(model), values_of(alone))


outcomes, test_on_four_ranks = CASES.tests(__file__)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", VIEW)
    warnings.filterwarnings("ignore", "this program of .* steps, run back in")
    CASES.run(lambda: (init_gloo(), mesh()))
