"""The live display of training at a terminal: two lines, whatever the number of tasks."""

import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.segment import Segment

from adamerge.backbones.base import batch_size

_GAP = "  "


class Progress(ProgressBar):
    """Step, speed, time and the losses, on rank 0: refreshed at a terminal, elsewhere a line per logging interval.

    Losses are read at the logging interval, all in one transfer, where Lightning reads them too; no other step waits
    for the device.

    Args:
        console: Where to draw; by default stdout.
    """

    def __init__(self, *, console: Console | None = None) -> None:
        super().__init__()
        self._console, self._enabled = console or Console(), True
        self._live: Live | None = None
        self.display = Display()

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._enabled:
            return
        self.display = Display(trainer.global_step, trainer.max_steps if trainer.max_steps > 0 else None)
        if self._console.is_terminal:
            self._live = Live(self.display, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        samples = trainer.world_size * sum(batch_size(each) for each in batch.values())
        self.display.advance(trainer.global_step, samples)
        stepped = not trainer.fit_loop._should_accumulate()
        if stepped and trainer.global_step % max(1, trainer.log_every_n_steps) == 0:
            self.display.losses = _losses(trainer.logged_metrics)
            if self._live is None:
                self._console.print(self.display.text(), soft_wrap=True, highlight=False, markup=False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.display.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.display.resume()
        accuracy = trainer.callback_metrics.get("val/accuracy")
        if self._enabled and accuracy is not None:
            self.display.accuracy = float(accuracy)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _losses(logged: Mapping[str, Any]) -> dict[str, float]:
    """`train/loss` and every `train/TASK/TERM` as numbers; under the task's name alone if all share one term."""
    found = {name.removeprefix("train/"): value for name, value in logged.items() if name.startswith("train/")}
    if not found:
        return {}
    numbers = torch.stack([torch.as_tensor(value).detach().float() for value in found.values()]).tolist()
    terms = {name.rpartition("/")[2] for name in found if "/" in name and not name.startswith("penalty/")}
    short = {name: name.rpartition("/")[0] if "/" in name and len(terms) == 1 else name for name in found}
    named = {short[name]: number for name, number in zip(found, numbers, strict=True)}
    return {"loss": named.pop("loss"), **named} if "loss" in named else named


class Display:
    """What is displayed; plain numbers, since another thread draws them.

    Args:
        first: The step that training starts or goes on from.
        last: The step that it ends at; None where it is not known.
    """

    def __init__(self, first: int = 0, last: int | None = None) -> None:
        self.first, self.step, self.last = first, first, last
        self.losses: dict[str, float] = {}
        self.accuracy: float | None = None  # of the last validation, mean over tasks, in [0, 1]
        self._start, self._idle, self._paused = time.monotonic(), 0.0, 0.0
        self._marks: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=100)  # (seconds of training, samples so far)

    def advance(self, step: int, samples: int) -> None:
        """After a batch: the step reached, and the samples of all tasks and ranks in it."""
        self.step = step
        self._marks.append((self.elapsed - self._idle, self._marks[-1][1] + samples))

    def pause(self) -> None:
        """Validation begins, which is not training."""
        self._paused = time.monotonic()

    def resume(self) -> None:
        """Validation has ended."""
        if self._paused:
            self._idle, self._paused = self._idle + time.monotonic() - self._paused, 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since training started."""
        return time.monotonic() - self._start

    @property
    def speed(self) -> float | None:
        """Samples per second over the last batches."""
        (start, before), (end, now) = self._marks[0], self._marks[-1]
        return (now - before) / (end - start) if end > start else None

    @property
    def left(self) -> float | None:
        """Seconds to the last step, validation included, if all goes on as it did."""
        if self.last is None or self.step == self.first:
            return None
        return self.elapsed / (self.step - self.first) * max(0, self.last - self.step)

    def parts(self) -> list[str]:
        """What is said before the losses, the most important first."""
        count = f"{self.step}/{self.last}" if self.last is not None else str(self.step)
        return [
            f"{'Validating' if self._paused else 'Merging'}, step {count}",
            _clock(self.elapsed) + (f", {_clock(self.left)} left" if self.left is not None else ""),
            *([f"{self.speed:,.0f} samples/s"] if self.speed is not None else []),
            *([f"validation {100 * self.accuracy:.1f} %"] if self.accuracy is not None else []),
        ]

    def named_losses(self) -> list[str]:
        """Names with values."""
        return [f"{name} {value:.3f}" for name, value in self.losses.items()]

    def text(self) -> str:
        """Everything in one line of any length."""
        return _GAP.join([*self.parts(), *self.named_losses()])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Two lines that never break: progress, and as many losses as there is room for."""
        width = options.max_width - 1  # some terminals break a line that is full
        line = _fitting(self.parts(), width)
        yield Segment(line)
        room = min(40, width - len(line) - len(_GAP))
        if self.last is not None and room >= 10:
            yield Segment(_GAP)
            yield Bar(total=max(1, self.last), completed=min(self.step, self.last), width=room)
        yield Segment.line()
        yield Segment(_fitting(self.named_losses(), width))


def _fitting(parts: list[str], width: int) -> str:
    """The first parts that fit into a line, and «+3 more» for the others."""
    for number in range(len(parts), 0, -1):
        rest = [f"+{len(parts) - number} more"] if number < len(parts) else []
        line = _GAP.join([*parts[:number], *rest])
        if len(line) <= width:
            return line
    return parts[0][:width] if parts else ""


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
