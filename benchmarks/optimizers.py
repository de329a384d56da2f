"""Claim: a hundred steps with the default optimiser reach what 500 steps of Adam at 1e-3, AdaMerging's, reach.

The recipe zoo_distilled_layer_wise.yaml: KL to the experts, layer by layer from 0.3, eight tasks, 16 pictures of each
in a step. All settings see the same pictures in the same order, which differs between seeds. Scored on the test
pictures every 10 steps up to 100 and every 50 after that; most settings end at 100.

    python benchmarks/optimizers.py                                    # the table
    python benchmarks/optimizers.py --quick                            # a trial: one seed, few steps
    python benchmarks/optimizers.py --keep /tmp/curves "Adam 1e-3"     # one row; where it was stopped, it goes on
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from common import CONFIGS, company, quiet, show
from merges import Summed
from rich.progress import track
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from adamerge.backbones.base import batch_size
from adamerge.config import parse
from adamerge.data import UnlabeledTasks
from adamerge.evaluation import classes_of, evaluate
from adamerge.merged import MergedModel
from adamerge.module import adam
from adamerge.recipe import Recipe
from adamerge.teachers import Keeper, Teachers
from adamerge.types import Batch

FILES = [CONFIGS / "demo.yaml", CONFIGS / "recipes" / "zoo_distilled_layer_wise.yaml"]
REFERENCE, SHORT, LONG = "Adam 1e-3", 100, 500
AIM = 100  # steps
SHOWN = (20, 50, 100, 500)
Curve = Mapping[int, float]  # step -> accuracy in %, mean over tasks


class Stretched(Adam):
    """Adam whose step for coefficient [t, g] is divided by ||tau_tg||, relative to the root mean square of them."""

    def __init__(self, parameters: Iterable[Tensor], norm_TG: Tensor, *, lr: float, power: float) -> None:
        super().__init__(parameters, lr=lr)
        self._factor_TG = (norm_TG.square().mean().sqrt() / norm_TG).pow(power).clamp(max=3)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        (raw_TG,) = self.param_groups[0]["params"]
        before_TG = raw_TG.clone()
        super().step(closure)
        raw_TG.copy_(before_TG + (raw_TG - before_TG) * self._factor_TG)


class Setting(NamedTuple):
    """An optimiser, and the factor of its learning rate at step k."""

    make: Callable[..., Optimizer]
    factor: Callable[[int], float] = lambda k: 1.0
    steps: int = SHORT
    needs_norms: bool = False


def rooted(k: int, *, after: int, warm: int) -> float:
    """1/sqrt, with a linear warm-up; both are felt from a number of steps on."""
    return min(1.0, (k + 1) / warm) / math.sqrt(1 + k / after)


SETTINGS = {
    REFERENCE: Setting(partial(Adam, lr=1e-3), steps=LONG),
    "Adam 3e-3": Setting(partial(Adam, lr=3e-3)),
    "Adam 1e-2, the default": Setting(partial(adam, guided=True), steps=LONG),
    "Adam 2e-2": Setting(partial(Adam, lr=2e-2), steps=LONG),
    "Adam 3e-2": Setting(partial(Adam, lr=3e-2)),
    "Adam 3e-2, betas 0.8, 0.95": Setting(partial(Adam, lr=3e-2, betas=(0.8, 0.95))),
    "Adam 3e-2, 10 to warm up, 1/sqrt after 20": Setting(partial(Adam, lr=3e-2), partial(rooted, after=20, warm=10)),
    "Adam 3e-2, step over sqrt(||tau||)": Setting(partial(Stretched, lr=3e-2, power=0.5), needs_norms=True),
    "SGD 3e-3, momentum 0.9": Setting(partial(SGD, lr=3e-3, momentum=0.9)),
}


class Zoo:
    """The model, its data and the experts' answers, made once for all runs."""

    def __init__(self) -> None:
        job = parse(FILES, {})
        self.recipe: Recipe = job.recipe
        backbone = self.recipe.backbone
        self.data: UnlabeledTasks = job.data.prepared_by(backbone.preparer, backbone.collate)
        self.data.seed = 0
        opened = self.recipe.open(self.data.classes)
        device = torch.device("cpu")
        opened.probe(self.data.stream()[0], device)
        self.model: MergedModel = opened.merged(opened.load_vectors())
        self.start = {name: p.detach().clone() for name, p in self.model.learnables().items()}
        keeper = Keeper(self.data, device, "benchmark")
        self.teachers = Teachers(opened, self.model)
        needs = frozenset().union(*(objective.needs for objective in self.recipe.objectives))
        self.data.tables = keeper.experts(self.teachers, needs)
        self.test: Mapping[str, list[Batch]] = {t: list(loader) for t, loader in self.data.eval_loaders().items()}
        self.classes = classes_of(self.model, self.data.num_classes, self.data.scored)

    def norms(self) -> Tensor:
        """||tau_tg||, [T, G]."""
        vectors = self.model.vectors
        square_TG = torch.zeros(len(vectors.tasks), len(vectors.space.group_names))
        for name, group in vectors.space.group_of.items():
            square_TG[:, group] += vectors.deltas(name).dense().flatten(1).square().sum(1)
        return square_TG.sqrt()

    def score(self) -> float:
        return 100 * fmean(evaluate(self.model, self.test, self.classes, torch.device("cpu")).values())

    def run(self, setting: Setting, seed: int, scored: Sequence[int]) -> dict[int, float]:
        """Train from the start; the accuracy at the steps that are asked for, the last of which ends it."""
        learnables = self.model.learnables()
        for name, parameter in learnables.items():
            parameter.data.copy_(self.start[name])
        self.data.seed = seed
        stream, curve = self.data.stream(), {}
        options = {"norm_TG": self.norms()} if setting.needs_norms else {}
        optimizer = setting.make(list(learnables.values()), **options)
        schedule = LambdaLR(optimizer, setting.factor)
        module = Summed(
            self.model.train(), objectives=self.recipe.objectives, loop=self.recipe.loop, teachers=self.teachers
        )
        for k in range(scored[-1]):
            total = module.loop.step(module, stream[k])
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
            if k + 1 in scored:
                curve[k + 1] = self.score()
        return curve

    def describe(self) -> str:
        batches = self.data.stream()[0]
        size = sum(parameter.numel() for parameter in self.start.values())
        return f"{size} coefficients, {len(batches)} tasks, {batch_size(next(iter(batches.values())))} pictures of each"


def scored_steps(steps: int) -> list[int]:
    return [k for k in range(10, steps + 1, 10) if k <= SHORT or k % 50 == 0]


def kept(folder: Path | None, name: str, run: Callable[[], dict[int, float]]) -> dict[int, float]:
    """A curve from the folder of those that were made before, else a new one."""
    path = folder / f"{name.replace('/', ' over ')}.json" if folder else None
    if path is not None and path.exists():
        return {int(step): score for step, score in json.loads(path.read_text()).items()}
    curve = run()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(curve))
    return curve


def first(curve: Curve, target: float) -> float:
    """The first step at which a curve is where it should come to; infinite where it never is."""
    return min((step for step, score in curve.items() if score >= target), default=math.inf)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    return {step: fmean(curve[step] for curve in curves) for step in curves[0]}


def row_of(curves: Sequence[Curve], target: float) -> list[str]:
    """Accuracies with their deviation over seeds; then the first steps, of the mean and of the worst seed."""

    def cell(step: int) -> str:
        scores = [curve[step] for curve in curves if step in curve]
        spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
        return f"{fmean(scores):.1f}{spread}" if scores else ""

    reached = [first(mean_curve(curves), target), max(first(curve, target) for curve in curves)]
    return [*map(cell, SHOWN), *("not reached" if math.isinf(step) else f"{step}" for step in reached)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="Rows of the table; all by default")
    parser.add_argument("--seeds", type=int, default=5, help="How many")
    parser.add_argument("--keep", type=Path, help="Folder of finished runs, which are not made again")
    parser.add_argument("--quick", action="store_true", help="One seed, a tenth of the steps")
    options = parser.parse_args()
    unknown = set(options.settings) - set(SETTINGS)
    if unknown:
        parser.error(f"there is no setting {', '.join(sorted(unknown))}; choose from {', '.join(SETTINGS)}")
    quiet()
    torch.set_num_threads(1)
    zoo, share, seeds = Zoo(), 10 if options.quick else 1, range(1 if options.quick else options.seeds)
    chosen = [name for name in SETTINGS if name in {REFERENCE, *(options.settings or SETTINGS)}]
    found: dict[str, list[Curve]] = {name: [] for name in chosen}
    for name, seed in track([(name, seed) for name in chosen for seed in seeds], "Training", transient=True):
        steps = scored_steps(max(10, SETTINGS[name].steps // share))
        run = partial(zoo.run, SETTINGS[name], seed, steps)
        found[name].append(kept(options.keep, f"{name}, {steps[-1]} steps, seed {seed}", run))
    last = LONG // share
    target = mean_curve(found[REFERENCE])[last]
    show(
        "Accuracy in % on the zoo after steps of distillation, by optimiser",
        f"{zoo.describe()}; seeds: {len(seeds)}, means ± their standard deviation; to be reached: {target:.1f}, "
        f"the {REFERENCE} row after {last} steps, in {AIM} steps with the default{company()}",
        ["optimiser", *(f"{step} steps" for step in SHOWN), "reached at step", "by the worst seed"],
        [[name, *row_of(curves, target)] for name, curves in found.items()],
    )


if __name__ == "__main__":
    main()
