"""Claim: five experts on handwritten digits merge best when coefficients are learned from labels.

Entropy alone does not do it on this pool: it falls while the accuracy of `turned` falls with it, and the merge ends
below task arithmetic, where it starts. Accuracy is on test scans that nothing was adapted on; entropy sees no labels,
the last row sees those of the 500 scans it adapts on. What differs between seeds is the order of the samples, so rows
without training have no spread.

    python benchmarks/digits.py
"""

import tempfile

from accuracy import SEEDS, Methods, row_of, scores_of_all
from common import CONFIGS, quiet, show

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
    "supervised, layer-wise": (SUPERVISED, {}),
}


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
