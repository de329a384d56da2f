"""Claim: Surgery on a frozen merge runs each picture through each encoder once, and gains what that allows.

The recipe zoo_surgery.yaml as it is shipped, but without validation. `kept`: what the encoders say is kept, and the
time to fill the cache counts. `at every step`: the merged encoder and every expert run at every step, their weights
held in memory. At most the number of encoder passes then, over those that are needed, can be gained.

    python benchmarks/surgery.py
    python benchmarks/surgery.py --peer [--pictures 500] [--run 20] [--small]
    python benchmarks/surgery.py --peer --zoo [--run 1000]

`--peer` compares with FusionBench: the loop of its surgery algorithm's `run`, on given coefficients and with its own
adapters. There the merged tower and the expert see 16 pictures of every task at each of 1000 steps. Ours encodes each
picture once by both towers, and steps on what it kept. Before times are compared, the adapters' gradients of the first
step, on what both towers say, are asserted to be the same. On random weights and pictures, both are reckoned from the
median of a few steps (`--run`), and the number of pictures of a task (`--pictures`) decides how much is gained.
`--zoo`: on the zoo's towers and pictures, from the median of all 1000, and beside them `adamerge.train`'s training.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from arms import PEER, WORKER, Clock, assert_same, measured
from common import CONFIGS, company, quiet, show
from merges import Summed, merged, run
from vit import INIT, Inputs

import adamerge
from adamerge import training
from adamerge.checkpoints import State
from adamerge.config import parse
from adamerge.demo import locate_demo
from adamerge.files import cache_dir
from adamerge.job import Job
from adamerge.merged import MergedModel
from adamerge.objectives import FeatureDistillation
from adamerge.opened import Opened
from adamerge.recipe import Recipe
from adamerge.rules import LayerWise
from adamerge.task_modules import Surgery
from adamerge.teachers import Keeper
from adamerge.types import KEPT, TaskInfo

FILES = [CONFIGS / "demo.yaml", CONFIGS / "recipes" / "zoo_surgery.yaml"]
REPEATS, STEPS, PICTURES = 3, 1000, 500  # of each task; the zoo has as many
AIM = 0.8  # of what can be gained
TOLERANCE = 1e-3  # of the gradient's norm


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


def trained(folder: str, *, kept: bool, decoded: bool, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds of training, cache included, and what was learned; nothing is found in the cache but the zoo."""
    options |= {"run.root": folder, "run.baselines": False, "data.eval_split": None, "trainer.limit_val_batches": 0}
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


def adapters(inputs: Inputs) -> Summed:
    """Surgery on a frozen layer-wise merge, on features of length one as in FusionBench."""
    model = merged(inputs, lambda vectors: LayerWise(vectors, init=INIT, trainable=False), before_head=adapter)
    return Summed(model, objectives=[FeatureDistillation(loss="l1")], teachers=Told())


def adapter(inputs: Inputs, task: str) -> Surgery:
    made = Surgery(TaskInfo(task, width=inputs.config.projection_dim), rank=16, normalize=True)
    made.down.data, made.up.data = inputs.adapter(task)
    return made


class Told:
    """Stands for teachers: what the experts say is in the batches."""

    blocks = ()


@torch.no_grad()
def encoded(inputs: Inputs, model: MergedModel, clock: Clock) -> dict[str, dict[str, torch.Tensor]]:
    """What the merged tower and the experts say of a batch of every task; a step does all of it."""
    experts = {task: inputs.expert(task).eval() for task in inputs.tasks}
    batches: dict[str, dict[str, torch.Tensor]] = {}
    with model.applied() as net:
        for _ in range(clock.steps):
            clock.mark()
            for task, pixels in inputs.batches.items():
                said = [model.backbone.features(tower, {"pixels": pixels}) for tower in (net, experts[task])]
                batches[task] = {KEPT: said[0], "expert.features": F.normalize(said[1], dim=-1)}
    return batches


def encode(inputs: Inputs, clock: Clock) -> None:
    """Each step encodes a batch of every task."""
    encoded(inputs, adapters(inputs).model, clock)


def adapt(inputs: Inputs, clock: Clock) -> None:
    """Each step is on kept features of every task."""
    module = adapters(inputs)
    batches = encoded(inputs, module.model, Clock(0, 1))
    first = {task: module.model.chain(task)[0] for task in inputs.tasks}
    clock.first_gradient({f"{task}.{name}": p for task, each in first.items() for name, p in each.named_parameters()})
    run(module, batches, clock)


ARMS = {"encode": encode, "adapt": adapt}


def against_peer(inputs: Inputs, pictures: int, steps: int, whole: float | None = None) -> None:
    """The table of FusionBench's loop and ours; `whole`: the seconds of `adamerge.train` on the same."""
    given = {"warm": 1, "steps": steps}
    theirs = measured(WORKER, "surgery", inputs.folder, peer=True, **given)
    ours = {arm: measured(__file__, arm, inputs.folder, **given) for arm in ARMS}
    apart = assert_same(ours["adapt"].gradients, theirs.gradients, TOLERANCE)
    encoding, step = ours["encode"].step, ours["adapt"].step
    every, kept = STEPS * theirs.step, encoding * pictures / 16 + STEPS * step
    rows = [("adamerge, kept", kept)]
    if whole is not None:
        rows.append(("adamerge.train, decoding and logging counted", whole))
    show(
        f"Seconds of {STEPS} steps of Surgery: adamerge and {PEER}",
        f"{inputs.describe()}; reckoned from the medians of {steps} steps: FusionBench's {theirs.step:.4f} s; ours "
        f"{step:.4f} s, and {encoding:.4f} s to encode 16 pictures of each task once; the adapters' first gradients "
        f"differ by {apart:.0e} of their norm (asserted: {TOLERANCE:.0e}){company()}",
        ["way", "seconds", "pictures per task and encoder", "gain"],
        [
            ["FusionBench", f"{every:,.1f}", f"{16 * STEPS:,}", "1.0"],
            *([way, f"{each:,.1f}", f"{pictures:,}", f"{every / each:.1f}"] for way, each in rows),
        ],
    )


def zoo_inputs(folder: Path) -> Inputs:
    """The zoo's towers, and 16 unlabeled pictures of each task."""
    import open_clip
    from datasets import load_from_disk

    job = parse(FILES, {})
    zoo, tasks = locate_demo("zoo/base").parent, list(job.data.tasks)
    made = {who: open_clip.create_model_and_transforms(f"local-dir:{zoo / who}") for who in ("base", *tasks)}
    look = made["base"][2]  # as for evaluation
    pictures = {task: load_from_disk(str(zoo / "data" / task))[job.data.split][:16]["image"] for task in tasks}
    pixels = [torch.stack([look(picture) for picture in each]) for each in pictures.values()]
    return Inputs.write_given(folder, "the zoo", [each[0].visual for each in made.values()], pixels)


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in ARMS:
        Clock.run(ARMS, sys.argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="compare with FusionBench")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of each task; the zoo has as many")
    parser.add_argument("--run", type=int, help="steps that the times are reckoned from: 20, on the zoo 1000")
    parser.add_argument("--small", action="store_true", help="a small tower")
    parser.add_argument("--zoo", action="store_true", help="the zoo's towers and pictures")
    asked = parser.parse_args()
    if asked.zoo and not (asked.peer and asked.pictures == PICTURES and not asked.small):
        parser.error("--zoo goes with --peer and --run alone: towers and pictures are the zoo's")
    if not asked.peer:
        on_the_zoo()
        return
    with tempfile.TemporaryDirectory() as name:
        if asked.zoo:
            quiet()
            inputs = zoo_inputs(Path(name))
            with only_the_zoo(name):
                options = {"data.batch_size": 16, "trainer.max_steps": STEPS, "trainer.val_check_interval": None}
                whole, _ = trained(name, kept=True, decoded=False, **options)
            against_peer(inputs, PICTURES, asked.run or STEPS, whole)
        else:
            shape = "small" if asked.small else "ViT-B/32"
            against_peer(Inputs.write(Path(name), shape=shape, tasks=8, images=16), asked.pictures, asked.run or 20)


@contextmanager
def only_the_zoo(folder: str) -> Iterator[None]:
    """A cache with the zoo, its heads, digests of files and compiled products, and nothing else that was kept."""
    cache = Path(folder) / "cache"
    cache.mkdir()
    for name in ("demo", "heads", "native", "sha256"):
        (cache_dir() / name).mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(cache_dir() / name)
    with patch.dict(os.environ, ADAMERGE_CACHE=str(cache)):
        yield


def on_the_zoo() -> None:
    """The table of the shipped recipe, kept features against encoders at every step."""
    quiet()
    times: dict[tuple[bool, bool], list[float]] = {}
    learned = {}
    for _ in range(REPEATS):
        for kept, decoded in product((False, True), (True, False)):
            with tempfile.TemporaryDirectory() as folder, only_the_zoo(folder):
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
