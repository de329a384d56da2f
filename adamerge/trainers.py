"""Lightning's trainer, set up for merging: what it may be asked, what it logs and keeps, and how it stops."""

import logging
import pickle
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from rich.console import Console

from adamerge.callbacks import GracefulStop, SaveOnException
from adamerge.data import UnlabeledTasks
from adamerge.job import TRAINER_DEFAULTS, Job
from adamerge.module import AdaMerge
from adamerge.progress import Progress
from adamerge.types import InputError

_EXPECTED = (  # warnings of Lightning's about what is meant here
    r"Found \d+ module\(s\) in eval mode",  # frozen parts stay in eval
    r"Experiment logs directory .* exists and is not empty",  # metrics.csv joins config.yaml in the run's own directory
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
    r"It is recommended to use `self.log\(.*sync_dist=True\)`",  # the counts were added up over ranks before
    r"Total length of `list` across ranks is zero",  # nothing to evaluate on
    r".*does not have many workers",  # small tasks are held in memory
    r"The dirpath has changed",  # a resumed run has a directory of its own
    r"Be aware that when using `ckpt_path`",  # how often to checkpoint may change from run to run
)


@contextmanager
def terse_lightning() -> Iterator[None]:
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


def make_trainer(job: Job) -> pl.Trainer:
    """Lightning's trainer with the defaults of merging; loggers and callbacks come when the directory is known.

    Raises:
        InputError: Options that Lightning or merging cannot work with.
    """
    options = {key: _counted(value) for key, value in {**TRAINER_DEFAULTS, **job.trainer}.items()}
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


def _counted(value: Any) -> Any:
    """A number of batches that the parser took for a share, which depends on what was imported first."""
    return int(value) if isinstance(value, float) and value > 1 and value.is_integer() else value


def eval_limit(trainer: pl.Trainer, num_batches: int) -> int:
    """How many batches are scored: what `trainer.limit_val_batches` allows; all where 0 asks for no validation."""
    limit = trainer.limit_val_batches
    return (limit if isinstance(limit, int) else int(limit * num_batches)) or num_batches


def read_checkpoint(path: str | None) -> tuple[str | None, dict[str, Any]]:
    """The file of a training checkpoint and what it holds; nothing for None.

    Raises:
        InputError: No such file, damaged, or of another program.
    """
    if path is None:
        return None, {}
    file = Path(path).expanduser()
    file = file / "checkpoints" / "last.ckpt" if file.is_dir() else file
    if not file.is_file():
        raise InputError(
            f"`ckpt_path` is '{path}', but there is no checkpoint at {file}; name a .ckpt file or a run's directory."
        )
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, LookupError, struct.error, pickle.UnpicklingError):
        held = {}
    if "adamerge" not in held:
        raise InputError(f"`ckpt_path` {file} is damaged, or no training checkpoint of adamerge.")
    return str(file), held


def add_to_run(trainer: pl.Trainer, job: Job, folder: Path, save_merge: Callable[[], None]) -> None:
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


def fit(trainer: pl.Trainer, module: AdaMerge, data: UnlabeledTasks, checkpoint: str | None) -> None:
    """Train; a stop that was asked for leaves as Ctrl-C or SIGTERM do."""
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
