"""The measurement of memory budgets, on a small problem."""

import pytest

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
pytest.importorskip("pytest_benchmark")

from bench import budgets

CASE = budgets.CASE._replace(N=512, V=16384)


def test_less_memory_is_held_and_takes_more_products():
    rows = budgets.measure(CASE, rounds=2, processes=1)
    assert [row["budget"] for row in rows] == budgets.budgets(CASE)
    assert rows[0]["products"] == 3 < rows[-1]["products"]
    assert all(row["predicted bytes"] <= row["budget"] for row in rows)
    assert all(0 < row["ms of the processor"]["p20"] <= row["ms of the processor"]["p80"] for row in rows)
    assert rows[0]["bytes"] > rows[-1]["bytes"]


def test_the_budgets_go_from_one_block_to_blocks_of_which_none_is_kept():
    plans = [budgets.cost(budget).plan for budget in budgets.budgets()]
    assert plans[0].plan == "one block"
    assert [plan.kept > 0 for plan in plans] == [False, True, True, True, False]
    curve = budgets.curve()
    assert curve[0]["ratio"] == 1.0 < curve[-1]["ratio"]
    assert curve[0]["bytes"] > curve[-1]["bytes"]
