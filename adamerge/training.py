"""From a recipe, data and a trainer's options to a learned merge, on one process or many."""

import logging
import pickle
import signal
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from rich.console import Console

from adamerge import artifact
from adamerge.callbacks import GracefulStop, SaveOnException
from adamerge.config import parse
from adamerge.data import UnlabeledTasks
from adamerge.evaluation import Scores, baselines, evaluate
from adamerge.job import TRAINER_DEFAULTS, Job, RunOptions
from adamerge.merged import MergedModel
from adamerge.module import AdaMerge, adam
from adamerge.multitask import MultiTaskModel
from adamerge.plan import plan
from adamerge.processes import launch, once
from adamerge.progress import Progress
from adamerge.recipe import Opened, Recipe
from adamerge.report import gain, score_table, shown, write_plots
from adamerge.run_folder import about, make_folder
from adamerge.terminal import progress_console
from adamerge.tracking import tracked
from adamerge.types import InputError

log = logging.getLogger("adamerge")

_EXPECTED = (  # warnings of Lightning's about what is meant here
    r"Found \d+ module\(s\) in eval mode",  # frozen parts stay in eval
    r"Experiment logs directory .* exists and is not empty",  # metrics.csv joins config.yaml in the run's own directory
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
    r"It is recommended to use `self.log\(.*sync_dist=True`",  # the confusion matrices were added up over ranks before
    r"Total length of `list` across ranks is zero",  # nothing to evaluate on
    r".*does not have many workers",  # small tasks are held in memory
    r"The dirpath has changed",  # a resumed run has a directory of its own
    r"Be aware that when using `ckpt_path`",  # how often to checkpoint may change from run to run
)


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
    with _terse_lightning():
        return _execute(job)


@contextmanager
def _terse_lightning() -> Iterator[None]:
    """Warnings only: what devices there are and when training ends is in the plan and in the table."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(max(each.level, logging.WARNING))
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _execute(job: Job) -> Run:
    pl.seed_everything(job.seed_everything, verbose=False)
    job = _own(job)
    trainer = _make_trainer(job)
    launch(trainer)
    if not trainer.is_global_zero:
        log.setLevel(logging.ERROR)
    device = trainer.strategy.root_device
    checkpoint = _checkpoint_path(job.ckpt_path)
    opened, first = _open(trainer, job), job.data.stream()[0]
    job.data.eval_loaders(trainer.global_rank, trainer.world_size)  # a missing or too small split is said now
    opened.leave_out_unreachable(first, device)
    raw = opened.load_vectors()
    model = trainer.precision_plugin.convert_module(opened.merged(raw)).to(device)
    module = AdaMerge(
        model,
        objectives=job.recipe.objectives,
        loop=job.recipe.loop,
        optimizer=job.recipe.optimizer or adam,
        lr_scheduler=job.recipe.lr_scheduler,
        num_classes=job.data.num_classes,
        seed=job.seed_everything,
    )
    job.data.labels = "labels" in module.needs
    if job.data.labels:
        job.data.check_labels()
    record = {**once(trainer, lambda: opened.record(model)), **about(job)}
    folder = once(trainer, lambda: make_folder(job, 10 * sum(p.numel() * 4 for p in model.learnables().values())))
    if job.data.split == job.data.eval_split:
        log.warning("Adapting on the split '%s' that is also evaluated on: scores are transductive.", job.data.split)
    log.info("%s", plan(job, opened, model, trainer.max_steps, trainer.world_size, folder))

    def scored(candidate: MultiTaskModel, tasks: Sequence[str]) -> Scores:
        loaders = job.data.eval_loaders(trainer.global_rank, trainer.world_size)
        convert = trainer.precision_plugin.convert_input
        with trainer.precision_plugin.forward_context():
            batches = {task: islice(loaders[task], _limit(trainer, len(loaders[task]))) for task in tasks}
            return evaluate(candidate, batches, job.data.num_classes, device, convert)

    def save(scores: Mapping[str, Scores], finished: bool = True) -> None:
        how_far = {"steps": trainer.global_step, "finished": finished}
        artifact.save(folder / "merge", model, {**record, **how_far, "scores": dict(scores)})

    scores: dict[str, Scores] = {}
    if job.run.baselines and job.data.eval_split is not None and not trainer.fast_dev_run:
        with progress_console(quiet=not trainer.is_global_zero).status("Scoring the baselines …"):
            for name, candidate, tasks in baselines(model, raw):
                with opened.buffers_of(tasks[0] if name.startswith("expert ") else None):
                    scores[name] = scored(candidate, tasks)
    del raw
    _add_to_run(trainer, job, folder, lambda: save(scores, finished=False))
    with tracked(trainer, folder, model.rule, scores, plot_every=job.run.plot_every, checkpoint=checkpoint):
        _fit(trainer, module, job.data, checkpoint)
        once(trainer, lambda: save(scores))
        if job.data.eval_split is not None:
            scores["this merge"] = scored(model.to(device), tuple(job.data.tasks))
            once(trainer, lambda: save(scores))
    if not trainer.fast_dev_run:
        once(trainer, lambda: _plot(folder, model, scores))
    return Run(folder, scores, model.folded(), model)


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


def _make_trainer(job: Job) -> pl.Trainer:
    options = {**TRAINER_DEFAULTS, **job.trainer}
    show = options.pop("enable_progress_bar", None)
    bar = Console().is_terminal if show is None else show
    given = (
        [options["callbacks"]]
        if isinstance(options.get("callbacks"), Callback)
        else list(options.get("callbacks") or ())
    )
    options["callbacks"] = [*given, *([Progress()] if bar else ())]
    if str(options.get("precision")) in ("16", "16-mixed", "16-true"):
        raise InputError(
            f"`trainer.precision: {options['precision']}` would not scale the losses inside a merging step, and small "
            "gradients would vanish. Use bf16-mixed, or 32."
        )
    if str(options.get("precision")) in ("64", "64-true"):
        raise InputError("`trainer.precision: 64-true` is not supported: learnables are fp32. Use 32.")
    epochs = isinstance(options.get("limit_train_batches"), int) and (options["max_epochs"] or -1) > 0
    if options["max_steps"] in (None, -1) and not (epochs or options.get("max_time") or options.get("fast_dev_run")):
        raise InputError("The training stream has no end: say in `trainer.max_steps` when to stop.")
    own = any(isinstance(callback, ModelCheckpoint) for callback in given)
    fixed = {"enable_progress_bar": bar, "use_distributed_sampler": False, "enable_checkpointing": own, "logger": False}
    try:
        trainer = pl.Trainer(**{**options, **fixed})
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise InputError(f"`trainer` is not set up well: {error}") from error
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise InputError(f"`trainer.strategy` {type(trainer.strategy).__name__} is not supported; use auto or ddp.")
    return trainer


def _limit(trainer: pl.Trainer, num_batches: int) -> int:
    """How many batches are scored: what `trainer.limit_val_batches` allows; all where 0 asks for no validation."""
    limit = trainer.limit_val_batches
    return (limit if isinstance(limit, int) else int(limit * num_batches)) or num_batches


def _checkpoint_path(path: str | None) -> str | None:
    if path is None:
        return None
    file = Path(path).expanduser()
    file = file / "checkpoints" / "last.ckpt" if file.is_dir() else file
    if not file.is_file():
        raise InputError(
            f"`ckpt_path` is '{path}', but there is no checkpoint at {file}; name a .ckpt file or a run's directory."
        )
    try:
        ours = "adamerge" in torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, LookupError, struct.error, pickle.UnpicklingError):
        ours = False
    if not ours:
        raise InputError(f"`ckpt_path` {file} is damaged, or no training checkpoint of adamerge.")
    return str(file)


def _add_to_run(trainer: pl.Trainer, job: Job, folder: Path, save_merge: Callable[[], None]) -> None:
    """Loggers, checkpoints and the careful stop, now that the directory is known."""
    if trainer.fast_dev_run:
        return
    asked = job.trainer.get("logger")
    others = (
        [asked]
        if isinstance(asked, Logger)
        else [each for each in asked or () if isinstance(each, Logger)]
        if asked is not True
        else []
    )
    trainer.loggers = [
        CSVLogger(folder, name="", version="", flush_logs_every_n_steps=trainer.log_every_n_steps),
        *others,
    ]
    trainer.callbacks += [SaveOnException(folder, save_merge), GracefulStop()]  # handlers stay until the save is done
    if not any(isinstance(callback, ModelCheckpoint) for callback in trainer.callbacks):
        every = job.run.checkpoint_every
        trainer.callbacks.append(
            ModelCheckpoint(folder / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=every)
        )


def _fit(trainer: pl.Trainer, module: AdaMerge, data: UnlabeledTasks, checkpoint: str | None) -> None:
    stop = next((callback for callback in trainer.callbacks if isinstance(callback, GracefulStop)), None)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message)
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except MisconfigurationException as error:
        raise InputError(f"`trainer` is not set up well: {error}") from error
    except SIGTERMException:
        if stop is not None and stop.received == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + signal.SIGTERM) from None
