"""The benchmarks that need a CUDA device, without one: their own code, the CPU in the device's place.

A mistake in it would cost the minutes for which a device was to be had.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import lvtp

sys.path.append(str(Path(__file__).parents[1]))  # bench/ is not installed

from bench import baselines, device, gpu, kernels, runs, smoke
from bench.shapes import Shape, arguments, work

ROOT = Path(__file__).parents[1]
SHAPE = Shape("small", 2, 200, 64, 32)


class Event:
    """One of the CUDA events, by the host's clock."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def stand_in(monkeypatch):
    """The CPU in the place of a CUDA device, for bench's own code: what a time means is not asked here."""
    stream = SimpleNamespace(wait_stream=lambda _: None)
    names = {
        "is_available": lambda: True,
        "get_device_name": lambda: "A stand-in",
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=1 << 10),
        "mem_get_info": lambda: (1 << 30, 1 << 30),
        "Event": Event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda _: contextlib.nullcontext(),
        "memory_allocated": lambda: 1,
        "max_memory_allocated": lambda: 8,
        **dict.fromkeys(("synchronize", "_sleep", "reset_peak_memory_stats", "empty_cache"), lambda *_: None),
    }
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in {"DEVICE": "cpu", "COPY": 1 << 12, "PRODUCT": 8, "FLUSH": 1 << 12, "SECONDS": 0.0}.items():
        monkeypatch.setattr(device, name, value)
    monkeypatch.setattr(torch, "compile", lambda plain: plain)
    tiny = Shape("LLaVA-1.5", 2, 20, 8, 8)
    for name in ("TARGETS", "KEY", "COMPILED", "SWEEP"):
        rows = dict.fromkeys((op, tiny._replace(keep=4 * (name == "SWEEP") + 8)) for op, _ in getattr(gpu, name))
        monkeypatch.setattr(gpu, name, tuple(rows))
    monkeypatch.setattr(kernels, "TARGETS", gpu.TARGETS)


@pytest.mark.parametrize(
    ("options", "rows"),
    [([], 5 + 3), (["--beside", "triton", "published"], 5), (["--rows", "sweep", "--beside", "eager"], 2 + 7)],
    ids=["key", "triton", "sweep"],
)
def test_bench_gpu_writes_what_the_report_reads(stand_in, tmp_path, options, rows):
    report = pytest.importorskip("bench.report", reason="needs the bench extra", exc_type=ImportError)
    gpu.main([str(tmp_path / "a"), *options])
    (run,) = report.runs.read(tmp_path)
    assert run.machine.startswith("A stand-in, driver ")
    assert len(run.rows) == rows
    for row in run.rows:
        assert row.errors.keys() <= {"triton"}
        assert row.seconds.keys() > {"lvtp", "lvtp, cold", "lvtp, call"}
        assert row.memory["lvtp, call"] == 7
        assert (row.least is None) == (row.dtype == "float32")
    wanted = {"published, call", "reference, call", "triton"} if "triton" in options else {"eager", "eager, call"}
    wanted |= {"compiled", "compiled, cold", "compiled, call"} if not options else set()
    assert wanted <= {variant for row in run.rows for variant in (*row.seconds, *row.errors)}
    lines = (tmp_path / "a" / "ops.txt").read_text().splitlines()
    assert sum(line.startswith(tuple(report.OPERATORS)) for line in lines) == rows
    assert "A stand-in" in report.page(tmp_path)


def test_bench_gpu_notes_a_variant_that_fails_and_times_the_others(stand_in, monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("no such chip\nand more")

    monkeypatch.setattr(baselines, "id_selection", fails)
    about = device.machine(device.Flush())
    row = gpu.row("id_selection", SHAPE, torch.float16, ("eager",), device.Flush(), about)
    assert row["errors"] == {"eager": "RuntimeError: no such chip\nand more"} | {"eager, call": row["errors"]["eager"]}
    assert row["seconds"].keys() == {"lvtp", "lvtp, cold", "lvtp, call"}
    assert gpu.text(row).endswith("\n    eager failed: RuntimeError: no such chip")


def test_a_warm_call_finds_its_features_just_written_and_a_cold_one_does_not(stand_in, monkeypatch):
    seen, names = {"lvtp": [], "lvtp, cold": []}, []

    def medians(timed):
        for name in list(timed) * 2:
            names.append(name)
            timed[name].before()
            timed[name].run()
        return {}

    def variants(name, shape, args, beside):
        def run():
            if names:  # not while it is made ready
                seen[names[-1]].append(args[0].clone())
                args[0].fill_(7)  # as if another call had been there

        return {"lvtp": lambda: run}

    monkeypatch.setattr(gpu, "variants", variants)
    monkeypatch.setattr(device, "medians", medians)
    about = {"bytes_per_second": 1.0, "flops_per_second": 1.0}
    gpu.row("id_selection", SHAPE, torch.bfloat16, (), device.Flush(), about)
    features = arguments("id_selection", SHAPE, torch.bfloat16, "cpu")[0]
    assert [torch.equal(x, features) for x in seen["lvtp"]] == [True, True]
    assert [bool((x == 7).all()) for x in seen["lvtp, cold"]] == [False, True]


def test_the_cache_is_emptied_by_reading(stand_in):
    flush = device.Flush()
    before = flush._data._version
    flush()
    assert flush._data._version == before
    assert flush._sum == flush._data.numel()


def test_the_least_time_is_the_longer_of_bytes_and_products():
    about = {"bytes_per_second": 1e12, "flops_per_second": 1e15}
    moved, computed = work("cosine_similarity", SHAPE, torch.bfloat16)
    assert gpu.least_seconds("cosine_similarity", SHAPE, torch.bfloat16, about) == moved / 1e12
    slow = about | {"flops_per_second": 1e6}
    assert gpu.least_seconds("cosine_similarity", SHAPE, torch.bfloat16, slow) == computed / 1e6


def test_the_kernels_of_a_call(stand_in, tmp_path, capsys):
    kernels.main([str(tmp_path)])
    said = (tmp_path / "kernels.txt").read_text()
    assert [line.split()[0] for line in said.split("\n\n")] == [name for name, _ in gpu.TARGETS]
    assert "a graph replay takes" in said
    names = {
        "void lvtp::cuda::(anonymous namespace)::multiply<float>(lvtp::cuda::(anonymous namespace)::Rows<float>, bool)":
        "multiply<float>",
        "void at::native::reduce<(int)512, at::native::Op<float, (int)4> >(at::native::Op<float, (int)4>)":
        "reduce<(int)512, Op<float, (int)4> >",
        "Memset (Device)": "Memset",
        "sm90_gemm_bf16": "sm90_gemm_bf16",
    }  # fmt: skip
    assert {name: kernels.short(name) for name in names} == names
    with torch.profiler.profile() as recorded:
        for _ in range(3):
            torch.ones(4).add_(1)
    rows = kernels.table(recorded.key_averages(), 3, DeviceType.CPU)
    assert {name: launches for name, launches, _ in rows}["add_"] == 1
    common = {"device_type": DeviceType.CUDA, "count": 4}
    events = [SimpleNamespace(**common, key=f"a::k<{i}>(int)", self_device_time_total=8.0 * i) for i in (1, 2)]
    assert kernels.table(events, 2) == [("k<2>", 2, 8.0), ("k<1>", 2, 4.0)]
    assert kernels.text("a call", kernels.table(events, 2), 2e-5).startswith("a call: 12.0 us in 4 kernels; a graph")


@pytest.mark.parametrize("tool", ["device", "gpu", "kernels", "smoke"])
def test_without_a_device_a_tool_says_so_at_once(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [tool, *[str(tmp_path)] * (tool in ("gpu", "kernels"))])
    with pytest.raises(SystemExit, match=f"bench.{tool}: no CUDA device"):
        {"device": device, "gpu": gpu, "kernels": kernels, "smoke": smoke}[tool].main()


def test_bench_device_measures_peaks_and_wants_the_compiled_kernels(stand_in, capsys, monkeypatch):
    info = lvtp.build_info()
    for state in ("loaded", "built without nvcc"):
        info["backends"]["native_cuda"] = state
        monkeypatch.setattr(lvtp, "build_info", lambda: info)
        with contextlib.nullcontext() if state == "loaded" else pytest.raises(SystemExit, match=state):
            device.main()
        said = capsys.readouterr().out
        assert re.search(r"^bytes_per_second: [\d.e+]+\nflops_per_second: [\d.e+]+$", said, re.M)


def test_prefill_refuses_a_transformers_that_is_too_old_before_it_builds_a_model(tmp_path):
    (tmp_path / "transformers-5.17.0.dist-info").mkdir()
    (tmp_path / "transformers-5.17.0.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 5.17.0\n")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", "import bench.prefill"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "lvtp.hf needs transformers >=" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("cases", ["CASES", "SMALL"])
def test_smoke_finds_all_right(capsys, cases):
    names = ["id_selection", "mean_similarity", "psca"] if cases == "SMALL" else ["mean_similarity", "dynamic_budget"]
    assert smoke.run(names, getattr(smoke, cases), "cpu") == 0
    assert capsys.readouterr().out.count("right") == 5 * len(names)
    assert all(shape.images == 1 for shape, _ in smoke.SMALL.values())


def test_smoke_finds_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(lvtp, "mean_similarity", lambda features: torch.ones(len(features)))
    assert smoke.main(["--only", "mean_similarity", "--small", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.count("WRONG  AssertionError: rho: ") == 5


# ------------------------------------------------------------------------------------------------------ bench/gpu.sh


def test_without_git_the_commit_is_what_the_carried_file_says(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "bench" / "runs.py"))
    monkeypatch.setenv("WHEELS", "out/wheels")
    assert runs.commit() == "unknown"
    (tmp_path / "out" / "wheels").mkdir(parents=True)
    (tmp_path / "out" / "wheels" / "COMMIT").write_text("c" * 40 + ", with changes\n")
    assert runs.commit() == "c" * 40 + ", with changes"
    assert runs.short(runs.commit()) == "c" * 12 + ", with changes"
    assert runs.short("unknown") == "unknown"


@pytest.mark.parametrize("part", ["A", "B"])
def test_a_part_ends_within_270_seconds_by_its_limits(part):
    stages = re.search(rf"^{part}=\((.*)\)$", (ROOT / "bench" / "gpu.sh").read_text(), re.M)[1].split()
    assert stages[0].startswith("install:")
    assert sum(int(stage.split(":")[1]) for stage in stages) <= 270


def gpu_sh(folder, *stages, seconds=None, **env):
    """Runs stages in a folder without .git, each within `seconds` if given; -> exit status, summary, log."""
    script = (ROOT / "bench" / "gpu.sh").read_text()
    (folder / "bench").mkdir()
    (folder / "site" / "lvtp").mkdir(parents=True)
    (folder / "bench" / "gpu.sh").write_text(re.sub(r"(\w):\d+\b", rf"\1:{seconds}", script) if seconds else script)
    (folder / "COMMIT").write_text("c" * 40)
    out = folder / "results"
    env = {**os.environ, "SITE": str(folder / "site"), "OUT": str(out), **env}
    done = subprocess.run(["bash", folder / "bench" / "gpu.sh", *stages], capture_output=True, text=True, env=env)
    found = {path.name: path.read_text() for path in out.glob("*")}
    return done.returncode, found.get("summary.txt", ""), found.get("log.txt", done.stderr)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a device")
def test_without_a_device_every_stage_ends_at_once(tmp_path):
    status, summary, log = gpu_sh(tmp_path, "smoke", "bench", PYTHON=sys.executable)
    assert status == 2
    assert f"commit {'c' * 40}\n" in summary
    assert re.findall(r"^(\w+) +[01] s  failed with exit status 1: no CUDA device$", summary, re.M) == [
        "smoke",
        "bench",
    ]
    assert re.findall(r"^== (\w+)$", log, re.M) == ["smoke", "bench"]


def test_what_a_stage_said_before_it_was_cut_short_is_kept(tmp_path):
    """On a machine with a device that hangs: `nvidia-smi` and `python` are made up; the limits are a second each."""
    programs = {"nvidia-smi": "echo A made-up GPU", "python": "case $* in *bench.smoke*) echo begun; sleep 60;; esac"}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    status, summary, log = gpu_sh(tmp_path, "smoke", "kernels", seconds=1, **path)
    assert status == 1
    assert re.search(r"^smoke +\d s  cut short after [12] s\nkernels +\d s  done$", summary, re.M)
    assert "== smoke\nbegun\n" in log


def test_an_unknown_stage_is_refused_with_the_usage(tmp_path):
    status, _, said = gpu_sh(tmp_path, "smokes", PYTHON=sys.executable)
    assert status == 2
    assert "bash bench/gpu.sh smoke bench" in said
