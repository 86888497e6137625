"""`python -m bench.quality`: what the selectors keep of real photographs, measured without any trained weights.

Features and importance are those of `lvtp demo`'s main picture: colour and DCT of each patch, classical saliency.
Writes quality.json, README.md (the table) and quality.png into the folder, bench/results/quality by default.
"""

import argparse
import json
import statistics
from pathlib import Path

import sklearn.datasets
import torch
from torch import Tensor
from tqdm import tqdm

import lvtp
from bench import baselines, plots
from lvtp.demo import descriptors, photo

BUDGETS = (16, 32, 64, 128, 192)
SEEDS = range(10)
METRICS = {
    "coverage": "mean cosine to the nearest kept token",
    "worst": "worst cosine to the nearest kept token",
    "redundancy": "mean cosine among kept tokens",
    "importance": "share of the importance kept",
}
HIGHER_IS_BETTER = {"coverage": True, "worst": True, "redundancy": False, "importance": True}


def photographs() -> dict[str, Path]:
    """Three that install with matplotlib and scikit-learn: a portrait, a temple, a flower."""
    found = {"portrait": photo.sample_photo()}
    names = sklearn.datasets.load_sample_images().filenames
    return found | {"temple": Path(names[0]), "flower": Path(names[1])}


def grid(k: int) -> Tensor:
    """k patches spread evenly over the square, row by row: int64 [k]."""
    rows = round(k**0.5)
    picks = []
    for r in range(rows):
        columns = k * (r + 1) // rows - k * r // rows
        y = int((r + 0.5) * photo.GRID / rows)
        picks += [y * photo.GRID + int((c + 0.5) * photo.GRID / columns) for c in range(columns)]
    return torch.tensor(picks)


def farthest_point(similarity: Tensor, importance: Tensor, k: int) -> Tensor:
    """The most important token, then always the one least similar to its nearest pick."""
    picks = [int(importance.argmax())]
    nearest = similarity[picks[0]].clone()
    while len(picks) < k:
        nearest[picks] = torch.inf
        picks.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, similarity[picks[-1]])
    return torch.tensor(picks)


def selections(features: Tensor, importance: Tensor, similarity: Tensor, k: int) -> dict[str, list[Tensor]]:
    """Picks by selector; random has one for each seed."""
    tokens = features.shape[1]
    draws = [torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:k] for seed in SEEDS]
    return {
        "ID-Selection": [lvtp.id_selection(features, importance, k)[0]],
        "PruneSID": [lvtp.prune_sid(features, importance, k)[0]],
        "top-k importance": [importance[0].topk(k).indices],
        "random": draws,
        "uniform grid": [grid(k)],
        "farthest point": [farthest_point(similarity, importance[0], k)],
    }


def measures(picks: Tensor, similarity: Tensor, importance: Tensor) -> dict[str, float]:
    """The four METRICS of picks [k]; similarity [N, N], importance [N]."""
    nearest = similarity[:, picks].amax(1)  # [N]
    among, k = similarity[picks][:, picks], len(picks)
    return {
        "coverage": float(nearest.mean()),
        "worst": float(nearest.min()),
        "redundancy": float((among.sum() - among.diagonal().sum()) / max(1, k * (k - 1))),
        "importance": float(importance[picks].sum() / importance.sum()),
    }


def jaccard(a: Tensor, b: Tensor) -> float:
    one, other = set(a.tolist()), set(b.tolist())
    return len(one & other) / len(one | other)


def stability(features: Tensor, importance: Tensor, n: int) -> dict[str, float]:
    """Mean Jaccard index of PruneSID's picks: between seeds of the published loop, of lvtp, and between the two."""
    loops, ours = [], []
    with torch.random.fork_rng(devices=[]):
        for seed in SEEDS:
            torch.manual_seed(seed)
            loops.append(baselines.published_prune_sid(features, importance, n)[0])
            ours.append(lvtp.prune_sid(features, importance, n)[0])
    pairs = [(i, j) for i in SEEDS for j in SEEDS if i < j]
    return {
        "published loop, between seeds": statistics.mean(jaccard(loops[i], loops[j]) for i, j in pairs),
        "lvtp, between seeds": statistics.mean(jaccard(ours[i], ours[j]) for i, j in pairs),
        "published loop against lvtp": statistics.mean(jaccard(loop, ours[0]) for loop in loops),
    }


def measure(budgets: tuple[int, ...] = BUDGETS) -> dict:
    """{"quality": {selector: {budget: {metric: mean over photographs}}}, "stability": {name: {budget: Jaccard}}}"""
    images = [photo.to_tensor(photo.crop(photo.load(path))) for path in photographs().values()]
    inputs = [(descriptors.patch_descriptors(rgb), descriptors.saliency(rgb)) for rgb in images]
    found, stable = {}, {}
    for k in tqdm(budgets, unit="budget"):
        for features, importance in inputs:
            similarity = lvtp.cosine_similarity(features)[0]
            for name, several in selections(features, importance, similarity, k).items():
                each = [measures(picks, similarity, importance[0]) for picks in several]
                mean = {metric: statistics.mean(e[metric] for e in each) for metric in METRICS}
                found.setdefault(name, {}).setdefault(k, []).append(mean)
            for name, value in stability(features, importance, k).items():
                stable.setdefault(name, {}).setdefault(k, []).append(value)
    return {
        "photographs": list(photographs()),
        "quality": {
            name: {k: {m: statistics.mean(e[m] for e in each) for m in METRICS} for k, each in by_budget.items()}
            for name, by_budget in found.items()
        },
        "stability": {
            name: {k: statistics.mean(each) for k, each in by_budget.items()} for name, by_budget in stable.items()
        },
    }


def table(result: dict) -> str:
    """Markdown; the best figure of each budget in bold."""
    lines = ["| kept of 576 | selector | " + " | ".join(METRICS.values()) + " |", "|---|---|" + "---|" * len(METRICS)]
    quality = result["quality"]
    for k in next(iter(quality.values())):
        for name, by_budget in quality.items():
            cells = []
            for metric in METRICS:
                best = max if HIGHER_IS_BETTER[metric] else min
                text = f"{by_budget[k][metric]:.3f}"
                same = text == f"{best(other[k][metric] for other in quality.values()):.3f}"
                cells.append(f"**{text}**" if same else text)
            lines.append(f"| {k} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stability_table(result: dict) -> str:
    budgets = list(next(iter(result["stability"].values())))
    lines = ["| PruneSID's picks | " + " | ".join(f"n = {k}" for k in budgets) + " |", "|---|" + "---|" * len(budgets)]
    for name, by_budget in result["stability"].items():
        lines.append(f"| {name} | " + " | ".join(f"{by_budget[k]:.2f}" for k in budgets) + " |")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    figure, axes = plots.plt.subplots(2, 2, figsize=(8, 5.6), sharex=True)
    for axis, (metric, title) in zip(axes.flat, METRICS.items(), strict=True):
        for (name, by_budget), colour, marker in zip(
            result["quality"].items(), plots.COLOURS, plots.MARKERS, strict=False
        ):
            budgets = [int(k) for k in by_budget]  # JSON makes them strings
            axis.plot(budgets, [e[metric] for e in by_budget.values()], color=colour, marker=marker, label=name)
        better = "higher" if HIGHER_IS_BETTER[metric] else "lower"
        axis.set_title(f"{title} ({better} is better)", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [str(k) for k in budgets])
        axis.minorticks_off()
    for axis in axes[1]:
        axis.set_xlabel("tokens kept of 576")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=8)
    plots.save(figure, path, f"means over {len(result['photographs'])} photographs; untrained patch descriptors")


PAGE = """# What the selectors keep, without weights

Means over three photographs ({photographs}; they install with matplotlib and scikit-learn), 576 patches
each, described and weighed as in `lvtp demo`: colour and DCT of each patch, classical saliency. Made by
`python -m bench.quality`.

{reading}

![coverage, redundancy and importance against the budget](quality.png)

{table}

## Does PruneSID repeat itself?

Mean Jaccard index of two selections on one photograph, over ten seeds of torch's random state (1: the same tokens).
The published loop takes an unseeded randomised SVD, lvtp converged eigenvectors.

{stability}
"""
# Read off the table; a change of the selectors or the descriptors needs it read again.
READING = """\
It shows what each rule trades: both selectors give up 13 to 29% of the importance that top-k keeps and cover the
other tokens far better than it does; random and grid picks keep 44 to 62% of that importance and, up to 128 tokens,
cover the average patch as well or better; farthest point has the best worst case. It does not show accuracy: these
descriptors are not a trained tower's, three photographs are few, and whether importance or coverage matters more is
for a model's answers to say."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("bench/results/quality"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    result = measure()
    (folder / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, folder / "quality.png")
    page = PAGE.format(
        photographs=", ".join(result["photographs"]),
        reading=READING,
        table=table(result),
        stability=stability_table(result),
    )
    (folder / "README.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
