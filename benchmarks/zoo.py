"""Claim: none; what each method gives on the embedded zoo, eight experts of a small CLIP.

Accuracy is on test pictures that nothing was trained or adapted on, by the shipped recipes. What differs between seeds
is the order of the samples, so rows without training have no spread.

    python benchmarks/zoo.py                            # the table
    python benchmarks/zoo.py --write docs/results.md    # also as a page
"""

import argparse
import tempfile
from pathlib import Path

from accuracy import SEEDS, Methods, row_of, scores_of_all
from common import CONFIGS, quiet, show

RECIPES = {
    "AdaMerging, task-wise": "zoo_task_wise",
    "AdaMerging, layer-wise": "zoo_layer_wise",
    "AdaMerging++, task-wise": "zoo_task_wise_pp",
    "AdaMerging++, layer-wise": "zoo_layer_wise_pp",
}
METHODS: Methods = {
    name: ((CONFIGS / "demo.yaml", CONFIGS / "recipes" / f"{recipe}.yaml"), {}) for name, recipe in RECIPES.items()
} | {"supervised, layer-wise": ((CONFIGS / "demo.yaml", CONFIGS / "demo_supervised.yaml"), {})}
PAGE = """# Results

Accuracy in % on the test pictures of the embedded zoo: eight experts fine-tuned from one small CLIP, merged. The
recipes `configs/recipes/zoo_*.yaml` adapt on unlabeled pictures that are neither trained nor tested on, the last row on
the same pictures with their labels (`configs/demo_supervised.yaml`); means over the seeds {seeds}, ± their standard
deviation. The zoo is made once on each machine, so that figures move a little from one
to the next. The image tower has 0.12 million parameters; the 500 test pictures of `scans` are drawn with repetition
from 500 scans that no other split holds.

```sh
python benchmarks/zoo.py --write docs/results.md
```

{table}
"""


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Methods on the embedded zoo.")
    parser.add_argument("--write", type=Path, help="Also write the table as a page of markdown")
    page = parser.parse_args().write
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        found = scores_of_all(METHODS, folder)
    head, rows = ["", *found["base"][0], "mean"], [[name, *row_of(runs)] for name, runs in found.items()]
    seeds = ", ".join(map(str, SEEDS))
    show(
        "Accuracy in % of merges of the zoo's eight experts",
        f"the recipes zoo_*.yaml; means over the seeds {seeds}, ± standard deviation over them",
        head,
        rows,
    )
    if page is not None:
        page.write_text(PAGE.format(seeds=seeds, table=markdown(head, rows)))


if __name__ == "__main__":
    main()
