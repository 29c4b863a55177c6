"""After the suite, each median as a ratio to the baseline that took turns with it."""


def pytest_terminal_summary(terminalreporter, config):
    groups: dict[str, list] = {}
    session = getattr(config, "_benchmarksession", None)
    for measured in session.benchmarks if session else []:
        if "ratio" in measured.extra_info:
            groups.setdefault(measured.group, []).append(measured)
    for group, measured in groups.items():
        terminalreporter.write_sep("-", f"ratio to the first: {group}")
        for m in measured:
            terminalreporter.write_line(
                f"{m.params['name']:44} {m.stats.median * 1e3:9.1f} ms {m.extra_info['ratio']:7.2f}"
            )
