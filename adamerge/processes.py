"""From one process to many, and work that is done once for all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from adamerge.types import InputError

_Result = TypeVar("_Result")


def launch(trainer: pl.Trainer) -> None:
    """Start the other processes and the process group now, for checks and baselines; `fit` finds them running."""
    launcher = trainer.strategy.launcher
    if launcher is not None and not isinstance(launcher, _SubprocessScriptLauncher):
        raise InputError(
            "Several devices need a process each: run `python -m adamerge.fit`, or set `trainer.devices` to 1 here."
        )
    if launcher is not None:
        launcher.launch(lambda: None, trainer=trainer)
    trainer.strategy.setup_environment()


def once(trainer: pl.Trainer, work: Callable[[], _Result]) -> _Result:
    """Do something on rank 0; all ranks get its result, or its error."""
    outcome: tuple[Any, BaseException | None] = (None, None)
    if trainer.is_global_zero:
        try:
            outcome = (work(), None)
        except Exception as error:
            outcome = (None, error)
    result, failure = trainer.strategy.broadcast(outcome)
    if failure is not None:
        raise failure
    return result
