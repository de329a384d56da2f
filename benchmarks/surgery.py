"""Claim: Surgery on a frozen merge runs each picture through each encoder once, and gains what that allows.

The recipe zoo_surgery.yaml as it is shipped, but without validation. `kept`: what the encoders say is kept, and the
time to fill the cache counts. `at every step`: the merged encoder and every expert run at every step, their weights
held in memory. At most the number of encoder passes then, over those that are needed, can be gained.

    python benchmarks/surgery.py
"""

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from common import CONFIGS, company, quiet, show

import adamerge
from adamerge import training
from adamerge.checkpoints import State
from adamerge.config import parse
from adamerge.files import cache_dir
from adamerge.job import Job
from adamerge.opened import Opened
from adamerge.recipe import Recipe
from adamerge.teachers import Keeper

FILES = [CONFIGS / "demo.yaml", CONFIGS / "recipes" / "zoo_surgery.yaml"]
REPEATS = 3
AIM = 0.8  # of what can be gained


class Held(dict[str, torch.Tensor]):
    """A checkpoint whose tensors are in memory."""

    def __init__(self, state: State) -> None:
        super().__init__({name: state[name].clone() for name in state})
        self.sha256 = state.sha256


def in_memory(opening: Callable[..., Opened]) -> Callable[..., Opened]:
    def opened(*arguments: Any, **options: Any) -> Opened:
        found = opening(*arguments, **options)
        return replace(found, experts={task: Held(state) for task, state in found.experts.items()})

    return opened


def trained(folder: str, *, kept: bool, decoded: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds of training, cache included, and what was learned; nothing is found in the cache but the zoo."""
    options = {"run.root": folder, "run.baselines": False, "data.eval_split": None, "trainer.limit_val_batches": 0}
    seconds = []

    def timed(job: Job, *arguments: Any) -> None:
        if decoded:
            for samples in job.data.datasets(job.data.split).values():
                samples.__getitems__(range(len(samples)))
        start = time.perf_counter()
        original(job, *arguments)
        seconds.append(time.perf_counter() - start)

    original = training.run_stages
    with ExitStack() as stack:
        stack.enter_context(patch.object(training, "run_stages", timed))
        if not kept:
            stack.enter_context(patch.object(Recipe, "open", in_memory(Recipe.open)))
            for method in ("experts", "merged"):
                stack.enter_context(patch.object(Keeper, method, lambda *_: {}))
        run = adamerge.train(FILES, **options)
    return seconds[0], {n: p.detach().clone() for n, p in run.learned.learnables().items()}


def main() -> None:
    quiet()
    zoo, heads = cache_dir() / "demo", cache_dir() / "heads"
    times: dict[tuple[bool, bool], list[float]] = {}
    learned = {}
    for _ in range(REPEATS):
        for kept, decoded in product((False, True), (True, False)):
            with tempfile.TemporaryDirectory() as folder:
                cache = Path(folder) / "cache"
                cache.mkdir()
                (cache / "demo").symlink_to(zoo)
                (cache / "heads").symlink_to(heads)
                with patch.dict(os.environ, ADAMERGE_CACHE=str(cache)):
                    seconds, learned[kept] = trained(folder, kept=kept, decoded=decoded)
            times.setdefault((kept, decoded), []).append(seconds)
    job = parse(FILES, {})
    samples = sum(len(data.split(job.data.split)) for data in job.data.tasks.values())
    at_every_step = job.trainer["max_steps"] * job.data.batch_size * len(job.data.tasks)
    bound = at_every_step / samples
    apart = max(float((learned[True][name] - learned[False][name]).abs().max()) for name in learned[True])
    rows = []
    for decoded, said in ((True, "decoded before"), (False, "decoding counts, once in both")):
        plain, fast = (median(times[kept, decoded]) for kept in (False, True))
        share = plain / fast / bound
        rows += [[f"at every step, {said}", f"{plain:.2f}", f"{at_every_step:,}", "1.0", ""]]
        rows += [[f"kept, {said}", f"{fast:.2f}", f"{samples:,}", f"{plain / fast:.1f}", f"{share:.0%}"]]
    show(
        "Seconds of Surgery training on the zoo",
        f"{job.trainer['max_steps']} steps, {job.data.batch_size} pictures per task; medians of {REPEATS}; the "
        f"learnables of both differ by at most {apart:.0e}{company()}",
        ["pictures", "seconds", "passes per encoder", "gain", f"of what is possible, {bound:.1f} (aim {AIM:.0%})"],
        rows,
    )


if __name__ == "__main__":
    main()
