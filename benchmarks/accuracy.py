"""What the accuracy benchmarks share: methods trained over seeds, beside the merges that need no training."""

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

import adamerge

SEEDS = (0, 1, 2)
Methods = Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]]  # name -> configurations, overrides


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
