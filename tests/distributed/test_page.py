"""The code of docs/distributed.md runs, on two ranks."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.ranks import Ranks
from tests.docs.test_readme import blocks_of


def test_the_page_runs(tmp_path: Path) -> None:
    blocks = blocks_of("docs/distributed.md")
    assert len(blocks) >= 5
    script = tmp_path / "page.py"
    script.write_text("\n".join([*blocks, "dist.destroy_process_group()", 'print("to the end")']))
    ignored = "ignore:FSDP2-wrapped module:UserWarning"  # the page says what it means
    with Ranks(["-W", "error", "-W", ignored, script], 2, tmp_path) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
        said = ranks.said()
    assert said.count("to the end") == 2
    assert said.count("1: these are weights of another network: in step 0 the coupling is Additive(scale=1.0)") == 2
