"""A pytest plugin: what each test cost, and which lines it ran, where coverage measures (``run.py``)."""

import os
import sys
import time
from collections.abc import Iterator

import pytest
import sitecustomize as measured  # type: ignore[import-not-found] # of everywhere/


def _now() -> dict[str, float]:
    t = os.times()
    return {
        "wall": time.perf_counter(),
        "cpu": t.user + t.system,
        "children": t.children_user + t.children_system,
        "dynamo_frames": measured.dynamo_frames(),
        **measured.counts,
    }


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if "coverage" in sys.modules:
        import coverage

        if current := coverage.Coverage.current():
            current.switch_context(item.nodeid)
    before = _now()
    result = yield
    after = _now()
    measured.record(kind="test", test=item.nodeid, **{k: round(after[k] - before[k], 4) for k in before})
    return result
