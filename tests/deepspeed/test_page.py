"""The program of docs/guides/sharded-heads.md prints, under ZeRO-3, the report that the page shows.

DeepSpeed is installed nowhere else: `make test-deepspeed` runs this.
"""

import pytest

pytest.importorskip("deepspeed", reason="make test-deepspeed installs DeepSpeed")

from ..helpers.snippets import DOCS, programs


def test_the_page_shows_what_is_printed(tmp_path):
    (program,) = programs(DOCS / "guides" / "sharded-heads.md")
    assert "deepspeed.initialize" in program.code
    assert program.run(tmp_path).endswith("\n" + program.output)
