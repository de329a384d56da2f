"""Claim: Surgery on a frozen merge runs each picture through each encoder once, and gains what that allows.

The recipe zoo_surgery.yaml as it is shipped, but without validation. `kept`: what the encoders say is kept, and the
time to fill the cache counts. `at every step`: the merged encoder and every expert run at every step, the weights read
from the page cache. At most the number of encoder passes then, over those that are needed, can be gained.

    python benchmarks/surgery.py
"""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from common import CONFIGS, company, quiet, show

import adamerge
from adamerge.artifact import read_record
from adamerge.config import parse
from adamerge.files import cache_dir
from adamerge.teachers import Keeper

FILES = [CONFIGS / "demo.yaml", CONFIGS / "recipes" / "zoo_surgery.yaml"]
REPEATS = 3
AIM = 0.8  # of what can be gained


def trained(folder: str, *, kept: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds of training, cache included, and what was learned; nothing is found in the cache but the zoo."""
    options = {"run.root": folder, "run.baselines": False, "data.eval_split": None, "trainer.limit_val_batches": 0}
    with ExitStack() as stack:
        if not kept:
            for method in ("experts", "merged"):
                stack.enter_context(patch.object(Keeper, method, lambda *_: {}))
        run = adamerge.train(FILES, **options)
    _, record = read_record(run.dir)
    return record["cost"]["seconds"], {n: p.detach().clone() for n, p in run.learned.learnables().items()}


def main() -> None:
    quiet()
    zoo = cache_dir() / "demo"
    times: dict[bool, list[float]] = {True: [], False: []}
    learned = {}
    for _ in range(REPEATS):
        for kept in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "cache").mkdir()
                (Path(folder) / "cache" / "demo").symlink_to(zoo)
                (Path(folder) / "cache" / "heads").symlink_to(cache_dir() / "heads")
                with patch.dict(os.environ, ADAMERGE_CACHE=f"{folder}/cache"):
                    seconds, learned[kept] = trained(folder, kept=kept)
            times[kept].append(seconds)
    job = parse(FILES, {})
    samples = sum(len(data.split(job.data.split)) for data in job.data.tasks.values())
    at_every_step = job.trainer["max_steps"] * job.data.batch_size * len(job.data.tasks)
    bound, ratio = at_every_step / samples, median(times[False]) / median(times[True])
    apart = max(float((learned[True][name] - learned[False][name]).abs().max()) for name in learned[True])
    show(
        "Seconds of Surgery training on the zoo",
        f"{job.trainer['max_steps']} steps, {job.data.batch_size} pictures per task; medians of {REPEATS}; the "
        f"learnables of both differ by at most {apart:.0e}{company()}",
        ["", "seconds", "passes per encoder", "gain", f"of what is possible (aim {AIM:.0%})"],
        [
            ["at every step", f"{median(times[False]):.2f}", f"{at_every_step:,}", "1.0", ""],
            ["kept", f"{median(times[True]):.2f}", f"{samples:,}", f"{ratio:.1f}", f"{ratio / bound:.0%}"],
        ],
    )


if __name__ == "__main__":
    main()
