"""A benchmark run shows how far it is, and keeps of pytest-benchmark's JSON what the report reads."""

import sys

from tqdm import tqdm


class Progress:
    def __init__(self, rows: int):
        self.bar = tqdm(total=rows, unit="row", mininterval=1, dynamic_ncols=True, file=sys.stderr)

    def pytest_runtest_logstart(self, nodeid):
        self.bar.set_postfix_str(nodeid.partition("[")[2].rstrip("]"), refresh=False)

    def pytest_runtest_logfinish(self):
        self.bar.update()

    def pytest_sessionfinish(self):
        self.bar.close()


def pytest_collection_finish(session):
    if not session.config.option.collectonly:
        session.config.pluginmanager.register(Progress(len(session.items)))


def pytest_report_teststatus(report):
    """The bar says it; a failure is still told at the end."""
    return ("passed" if report.when == "call" else "", "", "") if report.passed else None


def pytest_benchmark_update_json(config, benchmarks, output_json):
    info = output_json["machine_info"]
    cpu = {field: info["cpu"].get(field) for field in ("brand_raw", "count")}
    output_json["machine_info"] = {"cpu": cpu, "system": info["system"], "python_version": info["python_version"]}
    for each in output_json["benchmarks"]:
        each["stats"] = {field: each["stats"][field] for field in ("median", "iqr", "min", "max", "rounds")}
        for field in ("options", "param", "params", "fullname"):
            each.pop(field, None)
