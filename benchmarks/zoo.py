"""Claim: none; what each method gives on the embedded zoo, and whether its loss and its accuracy agree.

Every recipe configs/recipes/zoo_*.yaml, and learning from labels, over three seeds, by `adamerge compare`: a process
for each run, resumed where it was stopped. What differs between seeds is the order of the samples and the adapters'
first values, so rows without training have no spread.

    python benchmarks/zoo.py                            # the tables
    python benchmarks/zoo.py --write docs/results.md    # also as a page
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
import yaml
from common import CONFIGS
from rich.console import Console
from torchmetrics.functional.regression import spearman_corrcoef

from adamerge.comparing import compare
from adamerge.comparison import Comparison, Ran
from adamerge.report.metrics import read_metrics

RECIPES = [*sorted((CONFIGS / "recipes").glob("zoo_*.yaml")), CONFIGS / "demo_supervised.yaml"]
PAGE = """# Results

Accuracy in % on the test pictures of the embedded zoo: eight experts fine-tuned from one small CLIP, merged. The
recipes `configs/recipes/zoo_*.yaml` adapt on unlabeled pictures that are neither trained nor tested on;
`demo_supervised` learns from the labels of the same pictures. Means over the seeds 0, 1, 2, ± their standard
deviation; a process for each run. Seconds are of training, ten validations and the experts' answers included, on
cores that were busy with other work: they say what is long and what is short, no more. Memory is the whole process's.
The zoo comes with the package: rows without training are the same on every machine, to a picture or two, and trained
means to a point. The image tower has 0.12 million parameters; the 500 test pictures of `scans` are drawn with
repetition from 500 scans that no other split holds.

```sh
python benchmarks/zoo.py --write docs/results.md
```

{table}

## Does the loss tell?

Spearman's rank correlation along training between a task's falling loss and its rising test accuracy, at ten points
of a run, mean over the seeds. Near 1 the loss tells what the accuracy does, near 0 nothing moves together any more
(distillation has done most after the first tenth); below 0 the merge gets worse while its loss gets better. Of the
recipes with one phase; each by what it minimises.

{agreement}

"""


def agreement(run: Ran) -> dict[str, float]:
    """Per task the rank correlation between minus the loss, averaged since the last validation, and the accuracy."""
    metrics, found = read_metrics(Path(run.dir) / "metrics.csv"), {}
    for task, accuracy in metrics.accuracy.items():
        lines = [dict(line) for line in metrics.terms.get(task, {}).values()]
        loss = {step: sum(line[step] for line in lines) for step in sorted(set.intersection(*map(set, lines)))}
        losses, scores, start = [], [], -1
        for step, score in accuracy:
            since = [value for at, value in loss.items() if start < at <= step]
            if since:
                losses.append(-fmean(since))
                scores.append(score)
                start = step
        if len(set(scores)) > 1:  # else there is nothing to agree with
            found[task] = float(spearman_corrcoef(torch.tensor(losses), torch.tensor(scores)))
    return found


def objectives_of(recipe: Path) -> str | None:
    """What a recipe minimises; None where it has several phases."""
    model = yaml.safe_load(recipe.read_text())["model"]
    named = [each["class_path"].rpartition(".")[2] for each in model.get("objectives", [{"class_path": ".Entropy"}])]
    return None if "phases" in model else " + ".join(named)


def agreements(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    rows = []
    for recipe in RECIPES:
        named = objectives_of(recipe)
        (row,) = [row for row in comparison.rows if row.name == recipe.stem]
        if named is not None:
            runs = [agreement(run) for run in row.runs]
            per_task = [fmean(run[task] for run in runs if task in run) for task in comparison.tasks]
            rows.append([recipe.stem, named, *(f"{each:+.2f}" for each in per_task), f"{fmean(per_task):+.2f}"])
    return ["", "minimises", *comparison.tasks, "mean"], rows


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Methods on the embedded zoo.")
    parser.add_argument("--write", type=Path, help="Also write the tables as a page of markdown")
    parser.add_argument("--root", default="runs/zoo", help="Folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    often = ["trainer.log_every_n_steps=2"]  # for the losses of one run
    comparison = compare(
        RECIPES, on=[CONFIGS / "demo.yaml"], seeds=(0, 1, 2), root=options.root, jobs=options.jobs, options=often
    )
    head, rows = agreements(comparison)
    console = Console(width=220, highlight=False)
    console.print(str(comparison), markup=False)
    console.print(markdown(head, rows), markup=False)
    if options.write is not None:
        table = (comparison.folder / "compare.md").read_text().partition("\n\n")[0]
        options.write.write_text(PAGE.format(table=table, agreement=markdown(head, rows)))


if __name__ == "__main__":
    main()
