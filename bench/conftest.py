"""After the suite, each median as a ratio to the baseline of its group."""


def pytest_terminal_summary(terminalreporter, config):
    groups: dict[str, list] = {}
    session = getattr(config, "_benchmarksession", None)
    for measured in session.benchmarks if session else []:
        groups.setdefault(measured.group, []).append(measured)
    for group, measured in groups.items():
        base = next((m.stats.median for m in measured if m.extra_info.get("baseline")), None)
        if base is None:
            continue
        terminalreporter.write_sep("-", f"ratio to the baseline: {group}")
        for m in measured:
            terminalreporter.write_line(
                f"{m.params['name']:32} {m.stats.median * 1e3:9.1f} ms {m.stats.median / base:7.2f}"
            )
