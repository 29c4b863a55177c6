"""The README's figures are those of the committed result files."""

import json
from pathlib import Path

import pytest

from bench import figures

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_readme_says_what_the_results_say():
    """If it does not: make readme-figures."""
    assert README == figures.rewritten(README, figures.Results())


def test_every_block_is_there_once():
    assert sorted(found[1] for found in figures.BLOCK.findall(README)) == sorted(figures.BLOCKS)


def test_a_changed_number_is_seen():
    block = figures.BLOCK.search(README)
    assert block
    changed = README.replace(block[0], block[0].replace("1", "2"), 1)
    assert changed != README
    assert figures.rewritten(changed, figures.Results()) == README


@pytest.mark.parametrize("path", sorted(figures.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_are_of_a_known_commit(path):
    """And the plots that belong to them are there."""
    result = json.loads(path.read_text())
    assert result["header"]["commit"]
    assert result["header"]["dirty"] is False
    if path.stem.startswith("distributed-"):
        assert len(result["rows"]) == 6 * len(result["ranks"])
        return
    if not path.stem.startswith(figures.NO_RUNS):
        assert all((path.parent / name).exists() for name in result["plots"])


def test_looks_are_no_source(tmp_path):
    others = [f"{name}machine-2026-03-01" for name in figures.NO_RUNS]
    for name in (
        *others,
        "machine-2026-01-01-quick",
        "machine-2025-01-01",
        "machine-2025-06-01",
        "distributed-2026-02-01",
    ):
        date = name.removesuffix("-quick")[-10:]
        (tmp_path / f"{name}.json").write_text(json.dumps({"header": {"date": date}, "rows": [1], "fits": []}))
    results = figures.Results(tmp_path)
    assert results.newest("rows")[0] == "machine-2025-06-01"
    assert [path.stem for path in results.distributed] == ["distributed-2026-02-01"]
    with pytest.raises(SystemExit, match="no result in bench/results has fits"):
        results.newest("fits")


def test_proofs_prefer_a_full_run_and_say_that_predictions_are_none_of_a_gpu(tmp_path):
    row = {"chip": "H200", "V": 128256, "kernel": "fused_ignore_ce forward", "share of the memory roof": 0.876}
    found = {"kernels": 49, "targets": ["sm_90"], "dtypes": ["bfloat16"], "spilling": 0, "narrow": 2}
    found |= {"faults": ["one"], "note": "Predictions, not measurements.", "quick": True}
    found |= {"predictions, not measurements": [row | {"bound": "issue slots"}, row | {"V": 32000, "bound": "bytes"}]}
    for name, date, proofs in (
        ("old", "2026-01-01", found | {"quick": False, "kernels": 4000}),
        ("new", "2026-02-01", found),
        ("without", "2026-03-01", None),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"header": {"date": date}, "proofs": proofs}))
    text = figures.proofs(figures.Results(tmp_path))
    assert text.startswith(
        "4000 kernels (every tile that a launch can choose), for sm_90 in bfloat16: none with spills, 2"
    )
    assert "1 faults in all ([old](bench/results/old.json))" in text
    assert "Predictions, not measurements." in text
    assert "0.88, issue slots" in text
    assert "bytes" not in text
    (tmp_path / "old.json").unlink()
    assert figures.proofs(figures.Results(tmp_path)).startswith("49 kernels (shapes of models)")
    (tmp_path / "new.json").unlink()
    assert figures.proofs(figures.Results(tmp_path)) == "No committed result has them yet: `make bench`."
