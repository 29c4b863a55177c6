"""The selection of `make test-quick` (`pytest --quick`): of every test, the first case of every backend."""

#: Tests that take long even so, and are left to `make test`; every file keeps at least one.
SLOW = {
    "test_bench_distributed.py": {"test_the_losses_send_a_few_numbers_a_kept_token"},
}


def select(items):
    """(selected, left out)."""
    selected, left_out, seen = [], [], set()
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        key = item.path, item.originalname, item.cls, backend
        slow = item.originalname in SLOW.get(item.path.name, ())
        (left_out if slow or key in seen else selected).append(item)
        seen.add(key)
    return selected, left_out
