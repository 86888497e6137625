"""The table at the end of a benchmark run: every figure with its baselines beside it."""

from bench.shapes import Shape


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    timed = [b for b in getattr(session, "benchmarks", ()) if "baselines" in b.extra_info]
    if not timed:
        return
    write = terminalreporter.write_line
    terminalreporter.section("medians in ms; in brackets: how many times what lvtp takes")
    threads = timed[0].extra_info["threads"]
    write(f"{threads} threads, torch {timed[0].extra_info['torch']}")
    for bench in timed:
        info = bench.extra_info
        median = bench.stats.median
        others = "  ".join(f"{v} {1e3 * s:.2f} ({s / median:.1f})" for v, s in info["baselines"].items())
        head = f"{info['name']:18s} {Shape.of(info)!s:44s} {info['dtype']:8s} {info['device']:4s}"
        write(f"{head} lvtp {1e3 * median:9.3f}   {others}")
