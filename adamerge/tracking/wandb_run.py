"""A run in Weights & Biases, through Lightning's `WandbLogger`; wandb is imported only where that logger was chosen."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.loggers import WandbLogger

from adamerge.evaluation import Scores
from adamerge.processes import once
from adamerge.rules import MergeRule
from adamerge.tracking.online import asked_mode, check_online
from adamerge.tracking.wandb_report import WandbReport
from adamerge.types import InputError

log = logging.getLogger("adamerge")


@contextmanager
def tracked(
    trainer: pl.Trainer,
    folder: Path,
    rule: MergeRule,
    scores: Mapping[str, Scores],
    *,
    plot_every: int = 100,
    checkpoint: str | None = None,
) -> Iterator[None]:
    """Around training and scoring: a W&B run that is finished whatever happens, if a `WandbLogger` was chosen.

    Args:
        trainer: Its loggers are known.
        folder: The run's directory; W&B's files go to `wandb` in it.
        rule: What is trained.
        scores: Accuracy in [0, 1] per row of the table and task, read at the end.
        plot_every: Optimiser steps between heatmaps of the coefficients; 0 for the last one only.
        checkpoint: What training goes on from; so does its W&B run.

    Raises:
        InputError: W&B cannot be started as asked.
    """
    logger = next((each for each in trainer.loggers if isinstance(each, WandbLogger)), None)
    if logger is None:
        yield
        return
    ends: list[Callable[[int], None]] = []  # on rank 0
    once(trainer, lambda: ends.append(start(logger, folder, _id_in(checkpoint))))
    shown = WandbReport(logger, folder, rule, scores, plot_every=plot_every)
    trainer.callbacks.append(shown)
    status = 1
    try:
        yield
        status = 0
    except KeyboardInterrupt:
        status = 255  # as wandb itself has it
        raise
    finally:
        for end in ends:
            try:
                shown.send_results(trainer.global_step)
            except Exception as error:  # the run itself, or what ended it, matters more
                log.warning("W&B did not get all results of this run: %s", error)
            finally:
                end(status)


def start(logger: WandbLogger, folder: Path, before: str | None) -> Callable[[int], None]:
    """Start a W&B run in the run's directory, or join the one that is under way and the caller's own.

    Args:
        logger: The chosen one; from its own settings it gets those of this run.
        folder: The run's directory, with the resolved configuration.
        before: The id of the W&B run to go on with.

    Returns:
        Ends what was started here, with an exit status, and gives the logger its own settings back.

    Raises:
        InputError: W&B cannot be started as asked.
    """
    import wandb

    if getattr(logger._experiment, "_is_finished", False):
        logger._experiment = None  # an earlier training with this logger
    ours, own = logger._experiment is None and wandb.run is None, (logger._wandb_init, logger._offline)

    def end(status: int) -> None:
        if ours and logger._experiment is not None:
            logger._experiment.finish(exit_code=status)
        logger._wandb_init, logger._offline = own

    try:
        if ours:
            _start(logger, folder, before)
        logger.log_hyperparams(yaml.safe_load((folder / "config.yaml").read_text()))
    except (wandb.Error, ValueError) as error:  # the second from its check of settings
        end(1)
        what = " ".join(str(error).split()).rstrip(". ")
        raise InputError(f"W&B could not start: {what}. Mend it, or set WANDB_MODE=offline.") from error
    return end


def _start(logger: WandbLogger, folder: Path, before: str | None) -> None:
    """Start online where that works, else offline, unless a mode was asked for."""
    import wandb

    init = logger._wandb_init = {key: value for key, value in logger._wandb_init.items() if value is not None}
    if init.get("dir", ".") == ".":  # Lightning's default
        init["dir"] = str(folder)
    if init["project"] == "lightning_logs" and "WANDB_PROJECT" not in os.environ:
        init["project"] = None if "WANDB_SWEEP_ID" in os.environ else "adamerge"  # a sweep has its own
    if before is not None and "id" not in init and "WANDB_RUN_ID" not in os.environ:
        init["id"] = before  # Lightning's `resume="allow"` fits: it is on the server, or in files that wait for `sync`
    if logger._offline:  # Lightning would tell os.environ, and so later runs
        init["mode"], logger._offline = "offline", False
    try:
        check_online(init)
        _ = logger.experiment  # starts
    except wandb.Error as error:
        if asked_mode(init) is not None:
            raise
        init["mode"] = "offline"
        folder = Path(logger.experiment.dir).parent
        reason = str(error).partition("\n")[0].rstrip(". ")
        log.warning("W&B is offline: %s. Send the run later: wandb sync %s", reason, folder)


def _id_in(checkpoint: str | None) -> str | None:
    """The id of the W&B run that a training checkpoint is from."""
    if checkpoint is None:
        return None
    states = torch.load(checkpoint, map_location="cpu", weights_only=True).get("callbacks", {})
    return states.get(WandbReport.__qualname__, {}).get("id")
