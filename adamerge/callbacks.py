"""What happens around training: stop when asked, lose nothing when stopped."""

import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from adamerge.ranks import sum_over_ranks
from adamerge.types import NonFiniteLoss

log = logging.getLogger("adamerge")


class GracefulStop(pl.Callback):
    """Ctrl-C and SIGTERM let the current optimiser step finish, on all ranks alike; a second Ctrl-C stops at once.

    Several ranks agree at the logging interval, one rank looks after every step. SLURM's signals stay Lightning's.

    Attributes:
        received: The signal that ended training, if one did.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment) or threading.current_thread() is not threading.main_thread():
            return

        def stop(number: int, frame: Any) -> None:
            if self.received is not None:  # asked twice: at once
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
            self.received = signal.Signals(number)

        for each in (signal.SIGINT, signal.SIGTERM):
            self._handlers[each] = signal.signal(each, stop)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        stop = self.received is not None
        if trainer.world_size > 1:
            if trainer.global_step % max(1, trainer.log_every_n_steps):
                return
            stop = bool(sum_over_ranks(torch.tensor(int(stop), device=pl_module.device)))
        if stop:
            self.received = self.received or signal.SIGTERM
            raise SIGTERMException

    def _restore(self) -> None:
        for each, handler in self._handlers.items():
            signal.signal(each, handler)
        self._handlers = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()


class SaveOnException(pl.Callback):
    """When training ends early for any reason, the merge so far and a checkpoint to resume from are saved by rank 0.

    Args:
        folder: The run's directory.
        save_merge: Writes the merge.
    """

    def __init__(self, folder: Path, save_merge: Callable[[], None]) -> None:
        self._folder, self._save_merge = folder, save_merge

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero:
            self._save(trainer, resumable=not isinstance(exception, NonFiniteLoss))
        if isinstance(exception, SIGTERMException):
            trainer.strategy.barrier()  # all ranks came here together: none leaves before the save is done

    def _save(self, trainer: pl.Trainer, resumable: bool) -> None:
        self._save_merge()
        where = self._folder / "merge"
        if not resumable:
            log.info("Stopped at step %d. The last good merge is in %s", trainer.global_step, where)
            return
        checkpoint = self._folder / "checkpoints" / "last.ckpt"
        # no barrier: the other ranks may be anywhere
        trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(weights_only=False), checkpoint)
        log.info(
            "Stopped at step %d. The merge so far is in %s; go on with --ckpt_path %s",
            trainer.global_step,
            where,
            checkpoint,
        )
