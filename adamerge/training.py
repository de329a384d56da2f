"""From a recipe, data and a trainer's options to a learned merge, on one process or many."""

import logging
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from adamerge import artifact
from adamerge import scores as kept_scores
from adamerge.config import parse
from adamerge.data import UnlabeledTasks
from adamerge.evaluation import Scores, baselines, classes_of, evaluate
from adamerge.hub import one_commit
from adamerge.job import Job, RunOptions
from adamerge.learnables import learnables_of
from adamerge.merged import MergedModel
from adamerge.multitask import MultiTaskModel
from adamerge.opened import Opened
from adamerge.plan import plan
from adamerge.preflight import survey_of
from adamerge.processes import launch, once
from adamerge.recipe import Recipe
from adamerge.report import gain, score_table, shown, write_plots
from adamerge.resume import restore
from adamerge.run_folder import about, make_folder
from adamerge.stages import run_stages, stages_of
from adamerge.task_vectors import TaskVectors
from adamerge.teachers import Teachers
from adamerge.terminal import progress_console
from adamerge.tracking import tracked
from adamerge.trainers import add_to_run, eval_limit, make_trainer, read_checkpoint, terse_lightning
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
        table = f"{score_table(self.scores, tasks=self.merge.tasks)}\n{gain(self.scores)}\n" if self.scores else ""
        scores = table or "Nothing was scored.\n"
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
    with terse_lightning(), one_commit() as commits:
        return _execute(job, commits)


def _execute(job: Job, commits: dict[tuple[str, str], str]) -> Run:
    pl.seed_everything(job.seed_everything, verbose=False)
    job = _own(job)
    trainer = make_trainer(job)
    launch(trainer)
    if not trainer.is_global_zero:
        log.setLevel(logging.ERROR)
    device = trainer.strategy.root_device
    checkpoint, held = read_checkpoint(job.ckpt_path)
    opened, batches = _open(trainer, job, commits), job.data.stream()[0]
    job.data.eval_loaders(trainer.global_rank, trainer.world_size)  # a missing or too small split is said now
    with trainer.precision_plugin.forward_context() if "mixed" in str(trainer.precision) else nullcontext():
        opened.probe(batches, device)
    raw = opened.load_vectors()
    model = trainer.precision_plugin.convert_module(opened.merged(raw)).to(device)
    teachers = Teachers(opened, model)
    stages = stages_of(job, trainer, model, teachers, held)
    record = {**once(trainer, lambda: opened.record(model)), **about(job)}
    if job.recipe.init_from is not None:
        artifact.start_from(job.recipe.init_from, model, record)
    if held:
        restore(model, held)
    trained = set().union(*(stage.trained for stage in stages))
    size = sum(each.parameter.numel() for name, each in learnables_of(model).items() if name in trained)
    folder = once(trainer, lambda: make_folder(job, 40 * size))
    for said in _said_of_data(job):
        log.warning("%s", said)
    ends = [stage.end for stage in stages]
    log.info("%s", plan(job, opened, model, ends, size, trainer.world_size, folder))

    def scored(candidate: MultiTaskModel, tasks: Sequence[str]) -> Scores:
        loaders = job.data.eval_loaders(trainer.global_rank, trainer.world_size)
        convert = trainer.precision_plugin.convert_input
        with trainer.precision_plugin.forward_context():
            batches = {task: islice(loaders[task], eval_limit(trainer, len(loaders[task]))) for task in tasks}
            return evaluate(candidate, batches, classes_of(model, job.data.num_classes, tasks), device, convert)

    cost: dict[str, Any] = {"learnables": size}

    def save(scores: Mapping[str, Scores], finished: bool = True) -> None:
        how_far = {"steps": trainer.global_step, "finished": finished, "cost": cost}
        artifact.save(folder / "merge", model, {**record, **how_far, "scores": dict(scores)})

    scores: dict[str, Scores] = {}
    if job.run.baselines and job.data.eval_split is not None and not trainer.fast_dev_run:
        with progress_console(quiet=not trainer.is_global_zero).status("Scoring the baselines …"):
            scores |= _baseline_scores(trainer, job, opened, model, raw, scored)
    del raw
    add_to_run(trainer, job, folder, lambda: save(scores, finished=False))
    with tracked(trainer, folder, model.rule, scores, plot_every=job.run.plot_every, checkpoint=checkpoint):
        start = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        run_stages(job, trainer, model, stages, teachers, checkpoint, held, lambda: save(scores, finished=False))
        cost |= {"seconds": round(time.perf_counter() - start, 3), "peak_memory": _peak_memory(device)}
        artifact.round_as_saved(model)
        once(trainer, lambda: save(scores))
        if job.data.eval_split is not None:
            scores["this merge"] = scored(model.to(device), job.data.scored)
            once(trainer, lambda: save(scores))
    if not trainer.fast_dev_run:
        once(trainer, lambda: _plot(folder, model, scores))
    return Run(folder, scores, model.folded(), model)


def _baseline_scores(
    trainer: pl.Trainer,
    job: Job,
    opened: Opened,
    model: MergedModel,
    raw: TaskVectors,
    scored: Callable[[MultiTaskModel, Sequence[str]], Scores],
) -> dict[str, Scores]:
    """Scores of all merges that need no training, experts with their own buffers; as an earlier run found them."""

    def key() -> str | None:
        batches = {task: eval_limit(trainer, len(loader)) for task, loader in job.data.eval_loaders().items()}
        settings = [str(trainer.precision), trainer.strategy.root_device.type, trainer.world_size, batches]
        return kept_scores.key_of(opened, model, raw, job.data, settings)

    known = once(trainer, key)
    found = once(trainer, lambda: kept_scores.find(known)) if known else None
    if found is not None:
        log.info("The baselines' scores are those of an earlier run on the same files and samples.")
        return found
    scores = {}
    for name, candidate, tasks in baselines(model, raw, job.data.scored):
        with opened.buffers_of(tasks[0] if name.startswith("expert ") else None):
            scores[name] = scored(candidate, tasks)
    if known:
        once(trainer, lambda: kept_scores.keep(known, scores))
    return scores


def _said_of_data(job: Job) -> list[str]:
    """What the scores do not say of themselves."""
    transductive = job.data.transductive()
    if job.data.split == job.data.eval_split:
        first = f"Adapting on the split '{job.data.split}' that is also evaluated on: scores are transductive."
    else:
        tasks = ", ".join(transductive)
        first = f"Adapting on the samples that are also evaluated on: scores of {tasks} are transductive."
    return [*([first] if transductive else []), *job.data.unscored()]


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
    backbone = job.recipe.backbone
    job = replace(job, recipe=copy(job.recipe), data=job.data.prepared_by(backbone.preparer, backbone.collate))
    if job.data.seed is None:
        job.data.seed = job.seed_everything
    if job.recipe.vectors.seed is None:
        job.recipe.vectors = replace(job.recipe.vectors, seed=job.seed_everything)
    return job


def _open(trainer: pl.Trainer, job: Job, commits: dict[tuple[str, str], str]) -> Opened:
    """Rank 0 checks the sources first, alone: it fetches, hashes, builds demos, and its error ends every rank.

    The others open the commits that it found.
    """
    mine = []

    def checked() -> dict[tuple[str, str], str]:
        survey_of(job)  # before anything large is fetched
        mine.append(job.recipe.open(job.data.classes))  # what stays here cannot travel
        return dict(commits)

    commits |= once(trainer, checked)
    return mine[0] if mine else job.recipe.open(job.data.classes)
