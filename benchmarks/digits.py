"""Claim: five experts on handwritten digits merge best when coefficients are learned from labels.

Entropy alone does not do it on this pool: it falls while the accuracy of `turned` falls with it, and the merge ends
below task arithmetic, where it starts. Accuracy is on test scans that nothing was adapted on; entropy sees no labels,
the last row sees those of the 500 scans it adapts on. What differs between seeds is the order of the samples, so rows
without training have no spread.

    python benchmarks/digits.py
"""

import tempfile
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from common import CONFIGS, quiet, show

import adamerge

SEEDS = (0, 1, 2)
Methods = Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]]  # name -> configurations, overrides
ENTROPY, SUPERVISED = (CONFIGS / "digits.yaml",), (CONFIGS / "digits.yaml", CONFIGS / "digits_supervised.yaml")
TIES = [
    {"class_path": "adamerge.transforms.Trim", "init_args": {"keep": 0.2}},
    {"class_path": "adamerge.transforms.ElectSign"},
]
METHODS: Methods = {
    "entropy, layer-wise": (ENTROPY, {}),
    "entropy, task-wise": (
        ENTROPY,
        {"model.rule": {"class_path": "adamerge.rules.TaskWise", "init_args": {"init": 0.3}}},
    ),
    "AdaMerging++, layer-wise": (ENTROPY, {"model.transforms": TIES}),
    "distilled, layer-wise": (
        ENTROPY,
        {
            "model.objectives": [{"class_path": "adamerge.objectives.Distillation"}],
            "model.optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
        },
    ),
    "supervised, layer-wise": (SUPERVISED, {}),
}


def scores_of_all(methods: Methods, folder: str) -> dict[str, list[dict[str, float]]]:
    """Per row of the table the accuracies by task, one dictionary per seed; baselines once."""
    found: dict[str, list[dict[str, float]]] = {}
    for method, (configs, overrides) in methods.items():
        for seed in SEEDS:
            first = not found
            options = {"seed_everything": seed, "data.seed": seed, "run.root": folder, "run.baselines": first}
            scores = adamerge.train(configs, **overrides, **options).scores
            if first:
                experts = [row for row in scores if row.startswith("expert ")]
                rows = [row for row in scores if row not in (*experts, "this merge")]
                found.update({row: [scores[row]] for row in rows})
                found["experts, each on its own"] = [
                    {task: acc for row in experts for task, acc in scores[row].items()}
                ]
            found.setdefault(method, []).append(scores["this merge"])
    return found


def row_of(runs: list[dict[str, float]]) -> list[str]:
    """Per task the mean over seeds; then the mean over tasks with its deviation over seeds. In %."""
    means = [100 * fmean(run.values()) for run in runs]
    spread = f" ± {stdev(means):.1f}" if len(means) > 1 else ""
    return [*(f"{100 * fmean(run[task] for run in runs):.1f}" for task in runs[0]), f"{fmean(means):.1f}{spread}"]


def main() -> None:
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        found = scores_of_all(METHODS, folder)
    show(
        "Accuracy in % of merges of five experts on handwritten digits",
        f"configs/digits.yaml: 300 steps of 16 samples per task; means over the seeds {', '.join(map(str, SEEDS))}, "
        "± standard deviation over them",
        ["", *found["base"][0], "mean"],
        [[name, *row_of(runs)] for name, runs in found.items()],
    )


if __name__ == "__main__":
    main()
