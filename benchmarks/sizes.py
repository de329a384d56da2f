"""Claim: what a run leaves behind is kilobytes, not models: checkpoints and merges hold learnables and nothing frozen.

python benchmarks/sizes.py
"""

import tempfile
from pathlib import Path

from common import CONFIGS, quiet, show

import adamerge

STEPS = 2


def main() -> None:
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        run = adamerge.train(
            CONFIGS / "digits.yaml",
            **{"trainer.max_steps": STEPS, "run.checkpoint_every": STEPS, "run.root": folder, "run.baselines": False},
        )
        files = {
            "base checkpoint": adamerge.open_state("demo:digits/base").files[0],
            "training checkpoint": run.dir / "checkpoints" / "last.ckpt",
            "merge.safetensors": run.dir / "merge" / "merge.safetensors",
            "merge.yaml": run.dir / "merge" / "merge.yaml",
        }
        sizes = {name: Path(file).stat().st_size for name, file in files.items()}
    space, learned = run.learned.vectors.space, sum(p.numel() for p in run.learned.learnables().values())
    show(
        "Files of a run beside the base it starts from",
        f"configs/digits.yaml, {STEPS} steps: {space.num_elements:,} merged numbers, {learned:,} learned ones",
        ["file", "bytes", "of the base"],
        [[name, f"{size:,}", f"{size / sizes['base checkpoint']:.1%}"] for name, size in sizes.items()],
    )


if __name__ == "__main__":
    main()
