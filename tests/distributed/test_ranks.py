"""What becomes of a case that goes wrong: it fails under its own name, and the cases after it run all the same."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.ranks import Cases, Outcomes

CASES = Cases(world=2)


@CASES
def before_all(rank: int, world: int) -> None:
    assert (dist.get_rank(), dist.get_world_size()) == (rank, world)


@CASES
def one_rank_dies(rank: int, world: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def one_rank_hangs(rank: int, world: int) -> None:
    if rank == 0:
        hanging_here()
    dist.barrier()


CASES.add("one rank hangs", one_rank_hangs, limit=3)


def hanging_here() -> None:
    time.sleep(3600)


@CASES
def a_process_group_is_left(rank: int, world: int) -> None:
    dist.new_group([0, 1])


@CASES
def a_setting_is_left(rank: int, world: int) -> None:
    os.environ["LEFT"] = "1"


@CASES
def one_rank_fails(rank: int, world: int) -> None:
    assert rank == 0, "rank 1 does not like this"


@CASES
def all_ranks_fail(rank: int, world: int) -> None:
    raise ValueError(f"no good on {rank}")


@CASES
def after_all(rank: int, world: int) -> None:
    dist.barrier()


outcomes = CASES.fixture(__file__)

FAILURES = {
    "one rank dies": r"'one rank dies' ended on 1 of 2 ranks, and not on \[1\]:\nexit codes: rank 0: \S+, rank 1: -9",
    "one rank hangs": r"'one rank hangs' ended on [01] of 2 ranks.*test_ranks\.py\", line \d+ in hanging_here",
    "a process group is left": r"on rank 0:\nleft behind: process groups was 1 and is 2\non rank 1:",
    "a setting is left": r"left behind: \$LEFT was None and is '1'",
    "one rank fails": r"on rank 1:\n.*rank 1 does not like this",
    "all ranks fail": r"no good on 0.*no good on 1",
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_has_its_own_name(name: str, outcomes: Outcomes) -> None:
    with pytest.raises(pytest.fail.Exception) as failure:
        outcomes.check(name)
    assert re.search(FAILURES[name], str(failure.value), re.DOTALL), failure.value


@pytest.mark.parametrize("name", ["before all", "after all"])
def test_the_cases_around_it_run(name: str, outcomes: Outcomes) -> None:
    outcomes.check(name)


def test_a_case_that_never_ran_fails(outcomes: Outcomes) -> None:
    with pytest.raises(pytest.fail.Exception, match="'not there' ended on 0 of 2 ranks"):
        outcomes.check("not there")


def test_nothing_is_left_of_them(outcomes: Outcomes) -> None:
    ranks = [path for path in Path("/proc").glob("[0-9]*/environ") if str(outcomes.folder).encode() in read(path)]
    assert ranks == []


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended, or is another's
        return b""


if __name__ == "__main__":
    CASES.run()
