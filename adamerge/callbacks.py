"""What happens around training: stop when asked, lose nothing when stopped."""

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.environments import SLURMEnvironment

log = logging.getLogger("adamerge")


class GracefulStop(pl.Callback):
    """Ctrl-C and SIGTERM let the current step finish, on all ranks alike; a second Ctrl-C stops at once.

    Both take the way that Lightning keeps for SIGTERM: rank 0 is marked, and all ranks learn of it before the next
    batch.

    Attributes:
        received: The signal that ended training, if one did.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(
            trainer.strategy.cluster_environment if hasattr(trainer.strategy, "cluster_environment") else None,
            SLURMEnvironment,
        ):
            return  # the scheduler's signals are Lightning's to answer

        def stop(number: int, frame: Any) -> None:
            if self.received is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.received = signal.Signals(number)
            trainer._signal_connector.received_sigterm = True

        for each in (signal.SIGINT, signal.SIGTERM):
            self._handlers[each] = signal.signal(each, stop)

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
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        checkpoint = self._folder / "checkpoints" / "last.ckpt"
        # no barrier: the other ranks may be anywhere
        trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(weights_only=False), checkpoint)
        self._save_merge()
        log.info(
            "Stopped at step %d. The merge so far is in %s; go on with --ckpt_path %s",
            trainer.global_step,
            self._folder / "merge",
            checkpoint,
        )
