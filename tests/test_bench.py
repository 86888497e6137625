"""The baselines compute what the operators do, and the benchmarks' own tools do what their reports say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lvtp

sys.path.append(str(Path(__file__).parents[1]))  # bench/ is not installed

from bench import baselines, soak
from bench.shapes import SHAPES, WITHOUT_BUDGET, Shape, arguments, work

SHAPE = Shape("small", 2, 200, 64, 32)


@pytest.mark.parametrize("name", ["cosine_similarity", "mean_similarity"])
def test_a_similarity_baseline_is_the_operator(name):
    args = arguments(name, SHAPE, torch.float32, "cpu")
    torch.testing.assert_close(getattr(baselines, name)(*args), getattr(lvtp, name)(*args), rtol=0, atol=1e-5)


@pytest.mark.parametrize("baseline", [baselines.id_selection, baselines.published_id_selection])
def test_an_id_selection_baseline_makes_the_same_picks(baseline):
    """All of them: no two of these tokens are as good as each other to within a rounding."""
    args = arguments("id_selection", SHAPE, torch.float32, "cpu")
    assert baseline(*args).tolist() == lvtp.id_selection(*args).tolist()


@pytest.mark.parametrize("n", [1, 16, 64])
def test_the_published_prune_sid_makes_the_same_picks_from_exact_vectors(n):
    features, importance, _ = arguments("prune_sid", SHAPE, torch.float32, "cpu")
    picks = baselines.published_prune_sid(features, importance, n, vectors=baselines.exact_vectors)
    assert picks.tolist() == lvtp.prune_sid(features, importance, n).tolist()


def test_the_randomised_prune_sid_makes_valid_picks_that_depend_on_the_seed():
    features, importance, n = arguments("prune_sid", SHAPE, torch.float32, "cpu")
    found = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(3):
            torch.manual_seed(seed)
            found.append(baselines.published_prune_sid(features, importance, n))
    for picks in found:
        assert picks.shape == (2, n)
        assert (picks.diff(dim=1) > 0).all()
        assert picks.min() >= 0
        assert picks.max() < 200
    assert not torch.equal(found[0], found[1]) or not torch.equal(found[0], found[2])


def test_quality_measures_what_it_says():
    quality = pytest.importorskip("bench.quality", reason="needs the bench extra", exc_type=ImportError)
    sim = torch.tensor([[1.0, 0.5, -0.2], [0.5, 1.0, 0.0], [-0.2, 0.0, 1.0]])
    found = quality.measures(torch.tensor([0, 1]), sim, torch.tensor([1.0, 2.0, 1.0]))
    assert found == pytest.approx({"coverage": 2 / 3, "worst": 0.0, "redundancy": 0.5, "importance": 0.75})
    assert quality.farthest_point(sim, torch.tensor([1.0, 0.0, 0.0]), 3).tolist() == [0, 2, 1]
    for k in quality.BUDGETS:
        picks = quality.grid(k)
        assert len(picks.unique()) == k
        assert 0 <= picks.min() <= picks.max() < 576


# ---------------------------------------------------------------------------------------------------------------- soak


def test_a_soak_finds_nothing(capsys):
    assert soak.main(["--minutes", "0.03", "--seed", "0"]) == 0
    said = capsys.readouterr().out
    for op in lvtp.ops.OPS:
        assert f"\n{op} " in said


def second_best(features, importance, k, gamma, mask):
    """The picks in another order."""
    return lvtp.reference.greedy_suppression(importance, lvtp.cosine_similarity(features), k, gamma, mask).flip(1)


BROKEN = {
    "id_selection": (second_best, "is left to rounding|is -1|ends in"),
    "cluster_nms": (lambda scores, *_: scores > 0, "against the rule"),
    "dynamic_budget": (lambda features, total, _: torch.full((len(features),), total), "in all|more than"),
    "mean_similarity": (lambda features, _: features.sum(), "assert rho.dtype|assert rho.shape"),
}


@pytest.mark.parametrize("op", BROKEN)
def test_a_soak_finds_a_broken_backend(capsys, monkeypatch, op):
    broken, said = BROKEN[op]
    monkeypatch.setattr(lvtp.reference, op, broken)
    assert 1 in [soak.main(["--minutes", "0", "--seed", str(seed), "--only", op]) for seed in range(8)]
    lines = capsys.readouterr().out
    assert re.search(f"reference on cpu: .*({said})", lines)
    repeat = re.search(r"python -m bench.soak (--minutes 0 --seed \d+ --only \w+)", lines)
    assert soak.main(repeat[1].split()) == 1


def test_a_soak_notices_what_is_refused_in_other_words(capsys, monkeypatch):
    monkeypatch.setattr(lvtp.reference.checks, "check_center", lambda *_: None)
    assert 1 in [soak.main(["--minutes", "0", "--seed", str(seed), "--only", "psca"]) for seed in range(40)]
    assert "refused differently on cpu" in capsys.readouterr().out


def test_a_soak_does_not_hang():
    script = """
import sys, time
import lvtp
from bench import soak
soak.PATIENCE = 1
lvtp.reference.psca = lambda *_: time.sleep(60)
sys.exit(soak.main(["--minutes", "1", "--seed", "3", "--only", "psca"]))
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=50)
    assert done.returncode != 0
    assert "hangs: python -m bench.soak --minutes 0 --seed 3 --only psca" in done.stderr
    assert "Timeout" in done.stderr


# ------------------------------------------------------------------------------------------------------------- prefill


def test_prefill_measures_every_part_of_every_variant(tmp_path, capsys, monkeypatch):
    """The same code as on a GPU, but for the clock, on tiny models."""
    prefill = pytest.importorskip("bench.prefill", reason="needs the hf extra", exc_type=ImportError)
    monkeypatch.setattr(prefill, "FEWEST", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # the other tests keep theirs
    prefill.main([*["--device", "cpu", "--geometry", "tiny", "--batch", "2", "--seconds", "0", "--out"], str(tmp_path)])
    result = json.loads((tmp_path / "prefill.json").read_text())
    assert {"machine", "date", "commit", "torch", "rows"} <= result.keys()
    table = capsys.readouterr().out
    a_token = 2 * 2 * 32 * 2 * 2  # keys and values, layers, width, bytes, prompts
    text = prefill.TEXT_BEFORE + prefill.TEXT_AFTER
    for model, subject in prefill.SUBJECTS.items():
        unpruned, *pruned = rows = [row for row in result["rows"] if row["model"] == model]
        newlines = 0 if subject.crops == 1 else 16
        assert (unpruned["method"], unpruned["keep"]) == ("none", 64 * subject.crops)
        assert unpruned["kv_bytes"] == (unpruned["keep"] + newlines + text) * a_token
        for row in pruned:
            assert row["kv_bytes"] == (row["keep"] + text) * a_token
            assert all(row[f"{part}_ms"] > 0 for part in ("tower", "prefill", "first_token"))
            assert row["method"] == "overhead" or row["selection_ms"] > 0
        backends = {(row["method"], row["backend"]) for row in rows}
        wanted = {(m, b) for m in ("id_selection", "prune_sid") for b in ("native", "reference", "published")}
        assert backends == wanted | {("none", "none"), ("overhead", "native")}
        assert f"{model}, batch 2" in table


def test_prefill_goes_on_without_a_variant_that_fails(monkeypatch, capsys):
    prefill = pytest.importorskip("bench.prefill", reason="needs the hf extra", exc_type=ImportError)

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lvtp.reference, "id_selection", fails)
    monkeypatch.setattr(prefill, "ROUNDS", 1)
    subject, geometry, cpu = prefill.SUBJECTS["llava-1.5-7b"], prefill.GEOMETRIES["tiny"], torch.device("cpu")
    group = prefill.Group(prefill.build(subject, geometry, cpu), subject, geometry, 1, cpu)
    failing = prefill.Variant("id_selection", "reference", 7)
    group.variants = [group.variants[0], failing]
    assert list(group.measure(0.0)) == group.variants[:1]
    assert f"{failing} failed: out of memory" in capsys.readouterr().out


def cpu_result(machine: str, seconds: float) -> dict:
    """As pytest-benchmark writes them."""
    rows = []
    for n, shape in enumerate((*SHAPES[:3], SHAPES[3], SHAPES[4]), 1):
        extra = {
            "name": "id_selection", **shape._asdict(), "dtype": "float32", "torch": "2.13.0", "threads": 2,
            "least_seconds": n * seconds / 5,
            "baselines": {"reference": 7 * n * seconds, "published loop": 3 * n * seconds},
        }  # fmt: skip
        rows.append({"extra_info": extra, "stats": {"median": n * seconds}})
    return {
        "machine_info": {"cpu": {"brand_raw": machine, "count": 2}},
        "commit_info": {"id": "c" * 40, "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": rows,
    }


def gpu_result() -> dict:
    """As bench.gpu writes them; the figures are made up."""
    rows = [
        {
            "name": name, **shape._asdict(), "dtype": "bfloat16", "seconds": {"lvtp": 1.23e-5, "eager, call": 4.56e-4},
            "least_seconds": 3.21e-6, "first_seconds": {"lvtp": 0.654}, "bytes": {"eager, call": 87 << 20},
            "errors": {"triton": "RuntimeError: no such chip"},
        }
        for name, shape in (("psca", SHAPES[1]), ("prune_sid", SHAPES[2]))
    ]  # fmt: skip
    machine = {"device": "A made-up GPU", "driver": "1", "date": "2026-01-03", "commit": "d" * 40}
    machine |= {"torch": "2.13.0", "cuda": "13.0"}
    return {"machine": machine, "rows": rows}


@pytest.fixture
def report():
    return pytest.importorskip("bench.report", reason="needs the bench extra", exc_type=ImportError)


def test_the_report_has_every_figure_of_every_run_and_nothing_across_runs(tmp_path, report, monkeypatch):
    prefill = {
        "machine": "a laptop", "date": "2026-01-04", "commit": "e" * 40, "torch": "2.13.0",
        "rows": [{"model": "tiny", "tokens": 2880, "prefill_ms": 98.76}],
    }  # fmt: skip
    files = {
        "a": ("ops", cpu_result("First CPU", 1.11e-3)), "b": ("ops", cpu_result("Second CPU", 4.71e-3)),
        "g": ("ops", gpu_result()), "p": ("prefill", prefill),
    }  # fmt: skip
    for folder, (name, result) in files.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    report.main()
    page = (tmp_path / "README.md").read_text()
    drawn = {path: path.read_bytes() for path in tmp_path.glob("*/*.png")}

    cpu, rest = page.split("## GPU")
    gpu, rest = rest.split("## In a model")
    sections = [cpu.split("### ")[1], cpu.split("### ")[2], gpu]
    for section, folder, machine in zip(sections, "abg", ("First CPU", "Second CPU", "A made-up GPU"), strict=True):
        assert machine in section
        for row in files[folder][1].get("benchmarks", ()):
            extra, ours = row["extra_info"], row["stats"]["median"]
            times = [report.digits(1e3 * s) for s in (ours, *extra["baselines"].values(), extra["least_seconds"])]
            assert [f"float32 | {times[0]} |" in each for each in sections] == [each is section for each in sections]
            assert "| {} | {} (7.00x) | {} (3.00x) | {} (20%) |".format(*times) in section
    for figure in ("12.3", "456 (37.1x)", "3.21 (26%)", "0.654 s", "87.0 MiB", "failed: RuntimeError: no such chip"):
        assert gpu.count(figure) >= 2, figure
    assert "| tiny | 2880 | 98.8 |" in rest
    for date, commit in (("2026-01-02", "c"), ("2026-01-03", "d"), ("2026-01-04", "e")):
        assert date in page
        assert commit * 12 in page

    for link in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert tmp_path / link in drawn
    assert {path.name for path in drawn} == {"latency-id_selection.png", "speedup.png"}
    report.main()
    assert page == (tmp_path / "README.md").read_text()
    assert drawn == {path: path.read_bytes() for path in drawn}


def test_the_report_gives_three_digits(report):
    values = {0.025678: "0.0257", 1.5: "1.50", 99.96: "100", 1193.5: "1194", 0.0: "0.00"}
    assert {value: report.digits(value) for value in values} == values


def test_a_curve_keeps_to_one_kind_of_input(report):
    result = cpu_result("A CPU", 1e-3)
    hard = json.loads(json.dumps(result["benchmarks"][1]))
    hard["extra_info"]["input"], hard["stats"]["median"] = "all alike", 5.0
    result["benchmarks"].append(hard)
    run = report.runs.cpu_run(Path("ops.json"), result)
    for field, milliseconds in (("keep", [1, 2, 3]), ("images", [2, 4, 5])):
        curve = report.charts.sweep(run, "id_selection", field)
        assert [1e3 * row.ours for row in curve] == pytest.approx(milliseconds)


def test_the_report_says_what_was_not_measured(tmp_path, report):
    assert report.page(tmp_path).count("Not measured yet") == 3
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "ops.json").write_text(json.dumps(cpu_result("A CPU", 1e-3)))
    page = report.page(tmp_path)
    assert page.count("Not measured yet") == 2
    for name in report.OPERATORS:
        assert ("any shape" in page.split(f"- `{name}`: ")[1].splitlines()[0]) == (name != "id_selection")
    assert "- float16: any operator\n- bfloat16: any operator\n" in page
    left = page.split("- `id_selection`: ")[1].splitlines()[0].split("; ")
    assert left == [shape.size for shape in SHAPES[5:]]


def test_the_committed_report_is_of_the_committed_results(report):
    results = report.runs.RESULTS
    assert (results / "README.md").read_text() == report.page(results)
    for link in re.findall(r"\]\((.*?)\)", report.page(results)):
        assert (results / link).exists(), link
    section = (results.parents[1] / "README.md").read_text().split("## Benchmarks")[1].split("\n## ")[0]
    figures = [line for line in section.splitlines() if line.startswith("|") and "---" not in line]
    assert len(figures) > 3
    assert set(figures) <= set(report.page(results).splitlines())


@pytest.mark.parametrize(
    ("brand", "folder"),
    [("Intel(R) Xeon(R) CPU", "Xeon"), ("AMD EPYC 7B12 64-Core Processor", "EPYC-7B12"), ("Apple M2", "Apple-M2")],
)
def test_a_result_has_a_folder_by_machine_and_date(report, brand, folder):
    place = report.runs.place(cpu_result(brand, 1e-3))
    assert place == report.runs.RESULTS / f"{folder}-2-cores-2026-01-02" / "ops.json"


def test_the_suite_times_every_operator_and_dtype_at_every_registered_shape():
    """But for what it says it leaves out."""
    bench_ops = pytest.importorskip("bench.bench_ops", exc_type=ImportError)
    rows = bench_ops.rows(SHAPES, bench_ops.OPERATORS)

    def key(name, shape, dtype):
        return name, shape[1:4], shape.keep * (name not in WITHOUT_BUDGET), dtype

    timed = {key(*row.values) for row in rows}
    assert len(timed) == len(rows)
    for name in lvtp.reference.__all__:
        for shape in SHAPES:
            for dtype in ("float32", "float16", "bfloat16"):
                takes = dtype == "float32" or name not in ("greedy_suppression", "cluster_nms")
                large = shape.tokens == 16384 and name not in ("id_selection", "mean_similarity", "dynamic_budget")
                assert (key(name, shape, dtype) in timed) == (takes and not large), (name, shape, dtype)


@pytest.mark.parametrize("name", lvtp.reference.__all__)
def test_every_operator_has_arguments_and_work(name):
    getattr(lvtp, name)(*arguments(name, SHAPE, torch.float32, "cpu"))
    assert min(work(name, SHAPE, torch.float32)) > 0
    assert work(name, SHAPE, torch.bfloat16)[0] <= work(name, SHAPE, torch.float32)[0]
