"""From a recipe, data and a trainer's options to a learned merge, on one process or many."""

import logging
import resource
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from adamerge import artifact
from adamerge.config import parse
from adamerge.data import UnlabeledTasks
from adamerge.evaluation import Scores, baselines, evaluate
from adamerge.job import Job, RunOptions
from adamerge.learnables import train_only
from adamerge.merged import MergedModel
from adamerge.module import AdaMerge, adam
from adamerge.multitask import MultiTaskModel
from adamerge.opened import Opened
from adamerge.plan import plan
from adamerge.processes import launch, once
from adamerge.recipe import Recipe
from adamerge.report import gain, score_table, shown, write_plots
from adamerge.resume import restore
from adamerge.run_folder import about, make_folder
from adamerge.teachers import EXPERT, Keeper, Teachers
from adamerge.terminal import progress_console
from adamerge.tracking import tracked
from adamerge.trainers import add_to_run, eval_limit, fit, make_trainer, read_checkpoint, terse_lightning
from adamerge.types import InputError

log = logging.getLogger("adamerge")


@dataclass
class Run:
    """What a run gives back.

    Attributes:
        dir: Its directory.
        scores: Accuracy in [0, 1] per row of the table and task; the last row is this merge.
        merge: The merged model, dense, ready for inference: merge(batch, task="svhn").
        learned: The model as it was trained, with its rule and task vectors.
    """

    dir: Path
    scores: dict[str, Scores]
    merge: MultiTaskModel
    learned: MergedModel

    def __str__(self) -> str:
        scores = f"{score_table(self.scores)}\n{gain(self.scores)}\n" if self.scores else "Nothing was scored.\n"
        return f"{scores}Run directory: {shown(self.dir)}"


def train(
    config: str | Path | Sequence[str | Path] | Mapping[str, Any] | Recipe,
    data: UnlabeledTasks | None = None,
    /,
    **overrides: Any,
) -> Run:
    """Learn a merge.

    Args:
        config: A YAML file, several to be stacked, a mapping of the same layout, or a `Recipe`.
        data: With a `Recipe`, the data.
        **overrides: On top of a configuration: `trainer={"max_steps": 10}`, or dotted keys `**{"trainer.max_steps":
            10}`. With a `Recipe`: `trainer` (options of Lightning's Trainer), `run` (`RunOptions`), `ckpt_path`,
            `seed_everything`.

    Raises:
        InputError: Anything in the configuration, sources or data that does not fit, before training; or a loss that is
            not finite.
    """
    if isinstance(config, Recipe):
        if data is None:
            raise InputError("With a Recipe, train() needs data: train(recipe, UnlabeledTasks(…)).")
        known = {"trainer", "run", "ckpt_path", "seed_everything"}
        if set(overrides) - known:
            unknown = ", ".join(sorted(set(overrides) - known))
            raise InputError(f"With a Recipe, train() takes {', '.join(sorted(known))}; not {unknown}.")
        if isinstance(overrides.get("run"), Mapping):
            overrides["run"] = RunOptions(**overrides["run"])
        return execute(Job(config, data, **overrides))
    if data is not None:
        raise InputError("With a configuration, train() takes the data from it; give data with a Recipe only.")
    return execute(parse(config, overrides))


def execute(job: Job) -> Run:
    """Run a job: launch the processes, check everything, score the baselines, train, save, score."""
    with terse_lightning():
        return _execute(job)


def _execute(job: Job) -> Run:
    pl.seed_everything(job.seed_everything, verbose=False)
    job = _own(job)
    trainer = make_trainer(job)
    launch(trainer)
    if not trainer.is_global_zero:
        log.setLevel(logging.ERROR)
    device = trainer.strategy.root_device
    checkpoint, held = read_checkpoint(job.ckpt_path)
    opened, batches = _open(trainer, job), job.data.stream()[0]
    job.data.eval_loaders(trainer.global_rank, trainer.world_size)  # a missing or too small split is said now
    opened.probe(batches, device)
    raw = opened.load_vectors()
    model = trainer.precision_plugin.convert_module(opened.merged(raw)).to(device)
    teachers = Teachers(opened, model)
    stages = _stages(job, model, teachers, trainer.max_steps, held)
    if any("labels" in stage.module.needs for stage in stages):
        job.data.check_labels()
    record = {**once(trainer, lambda: opened.record(model)), **about(job)}
    if job.recipe.init_from is not None:
        artifact.start_from(job.recipe.init_from, model, record)
    if held:
        restore(model, held)
    size = sum(parameter.numel() for parameter in model.trainable().values())
    folder = once(trainer, lambda: make_folder(job, 40 * size))
    if job.data.split == job.data.eval_split:
        log.warning("Adapting on the split '%s' that is also evaluated on: scores are transductive.", job.data.split)
    ends = [stage.end for stage in stages]
    log.info("%s", plan(job, opened, model, ends, trainer.world_size, folder))

    def scored(candidate: MultiTaskModel, tasks: Sequence[str]) -> Scores:
        loaders = job.data.eval_loaders(trainer.global_rank, trainer.world_size)
        convert = trainer.precision_plugin.convert_input
        with trainer.precision_plugin.forward_context():
            batches = {task: islice(loaders[task], eval_limit(trainer, len(loaders[task]))) for task in tasks}
            return evaluate(candidate, batches, job.data.num_classes, device, convert)

    cost: dict[str, Any] = {"learnables": size}

    def save(scores: Mapping[str, Scores], finished: bool = True) -> None:
        how_far = {"steps": trainer.global_step, "finished": finished, "cost": cost}
        artifact.save(folder / "merge", model, {**record, **how_far, "scores": dict(scores)})

    scores: dict[str, Scores] = {}
    if job.run.baselines and job.data.eval_split is not None and not trainer.fast_dev_run:
        with progress_console(quiet=not trainer.is_global_zero).status("Scoring the baselines …"):
            for name, candidate, tasks in baselines(model, raw):
                with opened.buffers_of(tasks[0] if name.startswith("expert ") else None):
                    scores[name] = scored(candidate, tasks)
    del raw
    add_to_run(trainer, job, folder, lambda: save(scores, finished=False))
    with tracked(trainer, folder, model.rule, scores, plot_every=job.run.plot_every, checkpoint=checkpoint):
        start = time.perf_counter()
        _train(job, trainer, model, stages, teachers, checkpoint, held, lambda: save(scores, finished=False))
        cost |= {"seconds": round(time.perf_counter() - start, 3), "peak_memory": _peak_memory(device)}
        artifact.round_as_saved(model)
        once(trainer, lambda: save(scores))
        if job.data.eval_split is not None:
            scores["this merge"] = scored(model.to(device), tuple(job.data.tasks))
            once(trainer, lambda: save(scores))
    if not trainer.fast_dev_run:
        once(trainer, lambda: _plot(folder, model, scores))
    return Run(folder, scores, model.folded(), model)


class _Stage(NamedTuple):
    module: AdaMerge
    train: str | None
    end: int  # the optimiser step that it ends at; -1 where the trainer's other limits end it


def _stages(job: Job, model: MergedModel, teachers: Teachers, max_steps: int, held: Mapping[str, Any]) -> list[_Stage]:
    """The recipe's phases, each with its module; all of them are checked before the first is trained."""
    phases = job.recipe.phases
    if held and held["adamerge"]["phase"] >= len(phases):
        raise InputError(
            f"`ckpt_path` was made in phase {held['adamerge']['phase'] + 1}; this run has {len(phases)} in all. Resume "
            "with the same `model.phases`."
        )
    if len(phases) > 1 and max_steps < 1:
        raise InputError("`model.phases` share `trainer.max_steps` among them; give it a number.")
    shares = list(accumulate(phase.share for phase in phases))
    ends = [round(max_steps * share / shares[-1]) for share in shares] if max_steps > 0 else [-1]
    stages = []
    for number, (phase, end) in enumerate(zip(phases, ends, strict=True)):
        train_only(model, phase.train)
        module = AdaMerge(
            model,
            objectives=phase.objectives,
            loop=phase.loop,
            optimizer=phase.optimizer or adam,
            lr_scheduler=phase.lr_scheduler,
            num_classes=job.data.num_classes,
            seed=job.seed_everything,
            teachers=teachers,
            phase=number,
        )
        stages.append(_Stage(module, phase.train, end))
    train_only(model, None)
    return stages


def _train(
    job: Job,
    trainer: pl.Trainer,
    model: MergedModel,
    stages: Sequence[_Stage],
    teachers: Teachers,
    checkpoint: str | None,
    held: Mapping[str, Any],
    save: Callable[[], None],
) -> None:
    """One phase after the other, from the one that the checkpoint was made in; the merge is saved between them."""
    first = held["adamerge"]["phase"] if held else 0
    if trainer.fast_dev_run:
        trainer.fit_loop.max_epochs = -1  # its one epoch would end with the first phase
    plugin, device = trainer.precision_plugin, trainer.strategy.root_device
    token = once(trainer, lambda: uuid.uuid4().hex)
    keeper = Keeper(job.data, device, token, str(trainer.precision), plugin.forward_context, plugin.convert_input)
    try:
        for number, stage in enumerate(stages[first:], start=first):
            resumed = checkpoint if number == first else None
            if stage.end >= 0:
                if stage.end <= trainer.global_step and resumed is None:
                    continue
                trainer.fit_loop.epoch_loop.max_steps = stage.end
            train_only(model.to(device), stage.train)
            _prepare(job, stage.module, keeper, teachers)
            fit(trainer, stage.module, job.data, resumed)
            if stage is not stages[-1]:
                once(trainer, save)
    finally:
        keeper.close()


def _prepare(job: Job, module: AdaMerge, keeper: Keeper, teachers: Teachers) -> None:
    """Set the training stream up for a phase: its tasks' order, its labels, and what is known of the samples."""
    data, model, wanted = job.data, module.model, module.needs & EXPERT
    data.labels = "labels" in module.needs
    data.slot = partial(module.loop.slot, tasks=model.tasks, seed=job.seed_everything)
    known: dict[str, dict[str, Any]] = keeper.experts(teachers, wanted) if wanted else {}
    inside = any(part.inside for task in model.tasks for part in model.chain(task))
    whole = all(wanted <= set(known.get(task, {})) for task in model.tasks)
    if model.is_fixed and not inside and not module.block_names and whole:
        for task, merged in keeper.merged(teachers).items():
            known.setdefault(task, {}).update(merged)
    # objectives of others may look at the samples, which every batch is said to hold
    data.inputs = any(not type(objective).__module__.startswith("adamerge.") for objective in module.objectives)
    data.tables = known


def _peak_memory(device: torch.device) -> int:
    """The most memory held at once, in bytes: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _plot(folder: Path, model: MergedModel, scores: Mapping[str, Scores]) -> None:
    """Pictures are no reason to lose a run."""
    try:
        write_plots(folder / "plots", model=model, scores=scores, metrics=folder / "metrics.csv", vectors=model.vectors)
    except (InputError, OSError, RuntimeError, ValueError) as error:
        log.warning("The plots were not drawn: %s", error)


def _own(job: Job) -> Job:
    """The job with a recipe and data of its own, whose seeds are the run's where none are given."""
    job = replace(job, recipe=copy(job.recipe), data=job.data.prepared_by(job.recipe.backbone.prepare))
    if job.data.seed is None:
        job.data.seed = job.seed_everything
    if job.recipe.vectors.seed is None:
        job.recipe.vectors = replace(job.recipe.vectors, seed=job.seed_everything)
    return job


def _open(trainer: pl.Trainer, job: Job) -> Opened:
    """Rank 0 checks the sources first, alone: it hashes, builds demos, and its error ends every rank."""
    mine = []
    once(trainer, lambda: mine.append(job.recipe.open(job.data.classes)))  # what stays here cannot travel
    return mine[0] if mine else job.recipe.open(job.data.classes)
