"""The figures and pictures of README and docs are those of the committed result files."""

import json
import re

import pytest

pytest.importorskip("PIL")
pytest.importorskip("tabulate")
pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

from pandas import DataFrame
from PIL import Image

from bench import figures, reading
from bench.proofs import pages, picture
from bench.speed import plots
from bench.speed.providers import LINEAR, LOGITS

LINK = re.compile(r"\]\(([^)#\s]+)\)")
PAGES = pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)


@PAGES
def test_pages_say_what_the_results_say(page):
    """If this fails, run `make readme-figures`."""
    text = page.read_text()
    assert text == figures.rewritten(page, text, reading.Results())


def test_every_block_is_on_a_page_once():
    found = {page: [block[1] for block in figures.BLOCK.findall(page.read_text())] for page in figures.PAGES}
    assert set(figures.BLOCKS) == {name for names in found.values() for name in names}
    assert all(len(names) == len(set(names)) for names in found.values())


@PAGES
def test_a_changed_number_is_seen(page):
    text = page.read_text()
    block = figures.BLOCK.search(text)
    assert block
    changed = text.replace(block[0], block[0].replace("1", "2"), 1)
    assert changed != text
    assert figures.rewritten(page, changed, reading.Results()) == text


def test_pictures_show_the_newest_results():
    """If this fails, run `make readme-figures`."""
    shown = figures.shown(reading.Results())
    assert {path.stem for path in figures.PICTURES.iterdir()} == set(shown)
    for name, (data, _) in shown.items():
        assert Image.open(figures.PICTURES / f"{name}.png").text["Data"] == plots.digest(data), name


@PAGES
def test_links_of_generated_blocks_lead_to_files(page):
    links = [link for block in figures.BLOCK.finditer(page.read_text()) for link in LINK.findall(block[0])]
    assert links
    for link in links:
        assert link.startswith("https://") or (page.parent / link).is_file(), link


@pytest.mark.parametrize("path", sorted(reading.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_are_of_a_known_commit(path):
    result = json.loads(path.read_text())
    assert result["header"]["commit"]
    assert result["header"]["dirty"] is False
    if path.stem.startswith("distributed-"):
        assert len(result["rows"]) == 6 * len(result["ranks"])


def test_looks_are_no_source(tmp_path):
    others = [f"{name}-machine-2026-03-01" for name in reading.COMMANDS]
    for name in (*others, "machine-2026-01-01-quick", "machine-2025-01-01", "machine-2025-06-01"):
        date = name.removesuffix("-quick")[-10:]
        found = {"header": {"date": date}, "rows": [1], "fits": [], "quick": False}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    results = reading.Results(tmp_path)
    assert list(results.files["run"]) == ["machine-2025-06-01", "machine-2025-01-01"]
    for command in reading.COMMANDS:
        assert list(results.files[command]) == [f"{command}-machine-2026-03-01"]
    assert results.newest("run", "rows")[0] == "machine-2025-06-01"
    assert results.newest("comparison", "rows")[0] == "comparison-machine-2026-03-01"
    assert results.newest_proofs()[0] == "proofs-machine-2026-03-01"
    with pytest.raises(SystemExit, match="no result in bench/results has fits: python -m bench.run"):
        results.newest("run", "fits")


HEADER = {"device": "Chip", "kind": "cuda", "cores": 2, "date": "2026-01-01", "commit": "0123456789"}


def row(chip="H200", V=128256, kernel="fused_ignore_ce forward", share=0.876, bound="bytes"):
    return {"chip": chip, "V": V, "kernel": kernel, "share of the memory roof": share, "bound": bound}


def test_proofs_prefer_a_full_run(tmp_path):
    found = {"kernels": 49, "targets": ["sm_90"], "dtypes": ["bfloat16"], "spilling": 0, "narrow": 2}
    found |= {"faults": ["one"], "quick": True}
    for name, date, proofs in (
        ("old", "2026-01-01", found | {"quick": False, "kernels": 4000}),
        ("new", "2026-02-01", found),
        ("without", "2026-03-01", None),
    ):
        header = HEADER | {"date": date}
        (tmp_path / f"{name}.json").write_text(json.dumps({"header": header, "proofs": proofs}))
    text = pages.compiled(reading.Results(tmp_path))
    assert text.startswith(
        "4000 kernels (every tile size that a launch can choose) were compiled for sm_90 in bfloat16, without a GPU. "
        "None of them spill registers, 2 use narrower loads than possible"
    )
    assert "lists all 1 that cost speed. (2026-01-01, commit 0123456, [old](bench/results/old.json))" in text
    newer = found | {"header": HEADER | {"date": "2026-04-01"}, "quick": False, "faults": []}
    (tmp_path / "proofs-2026-04-01.json").write_text(json.dumps(newer))
    text = pages.compiled(reading.Results(tmp_path))
    assert text.startswith("49 kernels (every tile")
    assert "No kernel spills registers to memory." in text
    (tmp_path / "proofs-2026-04-01.json").unlink()
    (tmp_path / "old.json").unlink()
    assert pages.compiled(reading.Results(tmp_path)).startswith("49 kernels (shapes of models)")
    (tmp_path / "new.json").unlink()
    with pytest.raises(SystemExit, match="no result in bench/results has proofs: python -m bench.proofs"):
        pages.compiled(reading.Results(tmp_path))


def published(error, without, shown=True):
    row = {"chip": "H100", "N x V": "8192 x 128256", "kernel": "Other", "published by": "Other#1", "shown": shown}
    return row | {"published ms": 2.0, "predicted ms": 2 + 2 * error, "error": error, "error if left out": without}


def test_predictions_say_that_they_are_none_of_a_gpu_and_how_far_they_are_off(tmp_path):
    found = {"header": HEADER, "note": "Predictions, not measurements."}
    found |= {picture.PREDICTIONS: [row(bound="issue slots"), row(V=32000)]}
    found |= {"published": [published(0.1, -0.2), published(0.01, 0.02, shown=False), published(-0.03, 0.3)]}
    (tmp_path / "predictions-2026-01-01.json").write_text(json.dumps(found))
    text = pages.predictions(reading.Results(tmp_path))
    assert text.startswith("Predictions, not measurements.")
    assert "0.88, issue slots" in text
    assert "bytes" not in text
    assert text.count("Other#1") == 2
    assert all(figure in text for figure in ("2.200", "+10.0%", "-20.0%"))
    assert "all 3 published times" in text
    assert "off by 3.0% at the median and 10.0% at most; by 20.0% and 30.0%" in text
    (tmp_path / "predictions-2026-01-01.json").unlink()
    with pytest.raises(SystemExit, match=re.escape("python -m bench.proofs.predicting")):
        pages.predictions(reading.Results(tmp_path))


def one_pass(kernel, options="plain", V=128256, **figures):
    row = {
        "chip": "H100",
        "arch": "sm_90",
        "options": options,
        "dtype": "bfloat16",
        "N": 8192,
        "V": V,
        "kernel": kernel,
    }
    row |= {"instructions_a_logit": 12.5, "registers": 128, "reads": 1.004, "writes": 1.0}
    return row | {"predicted_milliseconds": 1.5} | figures


def test_both_one_passes_stand_side_by_side_with_what_others_published(tmp_path):
    other = {"chip": "H100", "N": 8192, "V": 128256, "dtype": "bfloat16", "kernel": "Other", "source": "Other#1"}
    rows = [one_pass(kernel, options) for options in ("plain", "softcap") for kernel in ("one pass", "on chip")]
    rows[0] |= {"reads": 2.004, "predicted_milliseconds": 2.0}
    found = {"header": HEADER, "rows": rows, "published": [other | {"milliseconds": 2.209}]}
    (tmp_path / "one_passes-2026-01-01.json").write_text(json.dumps(found))
    text = pages.one_passes(reading.Results(tmp_path))
    assert "not measurements: nothing ran on a GPU" in text
    [plain, softcap] = [line for line in text.splitlines() if "H100, sm_90" in line]
    assert all(cell in plain for cell in ("2.00 / 1.00", "2.00 / 1.50", "Other 2.21 (Other#1)"))
    assert "Other" not in softcap


def budget(share, ratio):
    row = {"budget": share * 2**27, "plan": "vocabulary blocks", "kept blocks": 3, "blocks": 8, "products": 3.5}
    row |= {"predicted bytes": share * 2**27, "bytes": share * 2**27, "predicted ratio": 1.2, "ratio": ratio}
    return row | {"ms of the processor": {"p20": 90.0, "p50": 100.0 * ratio, "p80": 200.0}}


def test_budgets_are_written_and_drawn(tmp_path):
    found = {"header": HEADER | {"load": 3.2, "versions": {"torch": "2"}}, "rounds": 9, "processes": 3}
    found |= {"case": {"N": 1, "V": 2, "D": 3, "dtype": "bfloat16"}, "rows": [budget(1, 1.0), budget(0.5, 1.25)]}
    found["predicted curve"] = [{"bytes": 2**27, "ratio": 1.0}, {"bytes": 2**26, "ratio": 1.2}]
    (tmp_path / "budgets-2026-01-01.json").write_text(json.dumps(found))
    text = figures.budgets(reading.Results(tmp_path))
    assert "load was 3" in text
    assert all(cell in text for cell in ("vocabulary blocks, 3 of 8 kept", "128 MiB", "64 MiB", "1.25", "3.50"))
    data = plots.budgets(found)
    assert list(data.query("what == 'measured'")["ratio"]) == [1.0, 1.25]
    assert list(data.query("what == 'measured'")["p20"]) == [0.9, 0.9]
    assert list(data.query("what == 'predicted'")["budget"]) == [128.0, 64.0]
    plots.draw("budgets", data, "about", tmp_path / "budgets.png")
    assert Image.open(tmp_path / "budgets.png").text["Data"] == plots.digest(data)


def run(**tables):
    return {"header": HEADER, "rows": [], "memory": [], "training step": []} | tables


def measured(*more, shapes=(("base", 8, 8, 0.0), ("base", 8, 8, 0.5), ("N", 16, 8, 0.0), ("V", 8, 16, 0.0)), **values):
    values = {"dtype": "bfloat16", "direction": "both", "D": 8} | values
    return [
        values | {"kind": kind, "provider": provider, "shape": shape, "N": N, "V": V, "ignored": ignored}
        for kind, provider in (("logits", LOGITS[-1].name), ("linear", LINEAR[-1].name))
        for shape, N, V, ignored in shapes
    ]


def test_pictures_are_drawn_of_what_there_is(tmp_path):
    assert plots.pictures(run()) == {}
    rows = measured(ms={"p50": 1.0}, rate=1.0, roof=2.0)
    assert plots.pictures(run(memory=measured(bytes=2**20))).keys() == {"ignored", "gain", "tokens"}
    steps = [
        {"way": way, "ignored": share, "bytes": 2**30, "V": 8, "T": 8, "D": 8, "layers": 1}
        for way in ("plain", "patched")
        for share in (0.0, 0.75)
    ]
    every = plots.pictures(run(rows=rows, memory=measured(bytes=2**20), **{"training step": steps}))
    assert list(every) == ["ignored", "gain", "tokens", "bandwidth", "training-step"]
    for name, data in every.items():
        plots.draw(name, data, "here", tmp_path / f"{name}.png")
    kernels = ("fused_ignore_ce forward", "other forward")
    predictions = [row(chip, V, kernel) for chip in ("A", "B") for V in picture.VOCABULARIES for kernel in kernels]
    picture.draw(picture.rows({picture.PREDICTIONS: predictions}), "here", tmp_path / "roof.png")
    assert {path.stem for path in tmp_path.iterdir()} == {*every, "roof"}
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert Image.open(tmp_path / "training-step.png").text["Data"] == plots.digest(DataFrame(steps))


def test_a_picture_of_other_numbers_has_another_digest():
    one, other = (run(memory=measured(bytes=size * 2**20)) for size in (1, 2))
    digests = [plots.digest(plots.pictures(result)["ignored"]) for result in (one, other, json.loads(json.dumps(one)))]
    assert digests[0] != digests[1]
    assert digests[0] == digests[2]
