from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from adamerge import report
from adamerge.evaluation import Scores
from adamerge.rules import MergeRule


class WandbReport(pl.Callback):
    """What W&B shows beside Lightning's metrics: coefficients, scores, the merge. Rank 0 alone sends.

    Args:
        logger: Where to.
        folder: The run's directory.
        rule: What is trained; its coefficients are shown if it has such.
        scores: Accuracy in [0, 1] per row of the table and task, read at the end.
        plot_every: Optimiser steps between heatmaps of the coefficients; 0 for the last one only.
    """

    def __init__(
        self, logger: WandbLogger, folder: Path, rule: MergeRule, scores: Mapping[str, Scores], *, plot_every: int
    ) -> None:
        self._logger, self._folder, self._rule, self._scores = logger, folder, rule, scores
        self._every, self._plotted = plot_every, 0

    def state_dict(self) -> dict[str, Any]:
        """The W&B run's id, kept in training checkpoints."""
        run = self._logger._experiment
        return {"id": None if run is None or run.disabled else run.id}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.is_global_zero and self._every > 0 and trainer.global_step % self._every == 0:
            self._plot(trainer.global_step)

    def send_results(self, step: int) -> None:
        """Everything that is sent once, at the end, which is after optimiser step `step`."""
        self._plot(step)
        self._send_coefficients(step)
        self._send_scores(step)
        self._send_merge()

    def _plot(self, step: int) -> None:
        coef_TG = self._coefficients()
        if coef_TG is not None and step != self._plotted:
            figure = report.coefficient_heatmap(coef_TG, self._rule.tasks, self._rule.groups)
            self._logger.log_image("coefficients/heatmap", [figure], step=step)
            self._plotted = step

    def _coefficients(self) -> Tensor | None:
        coef_TG = self._rule.coefficients()
        return None if coef_TG is None else coef_TG.detach().cpu()

    def _send_coefficients(self, step: int) -> None:
        coef_TG, rule = self._coefficients(), self._rule
        if coef_TG is not None:
            rows = zip(rule.tasks, coef_TG.tolist(), strict=True)
            cells = [[task, *cell] for task, coef_G in rows for cell in zip(rule.groups, coef_G, strict=True)]
            self._logger.log_table("coefficients/table", ["task", "group", "coefficient"], cells, step=step)

    def _send_scores(self, step: int) -> None:
        if not self._scores:
            return
        tasks = list(dict.fromkeys(task for row in self._scores.values() for task in row))
        table = [[name, *map(row.get, tasks), report.mean(row)] for name, row in self._scores.items()]
        self._logger.log_table("scores/table", ["merge", *tasks, "mean"], table, step=step)
        if "this merge" in self._scores:
            last = self._scores["this merge"]
            named = {f"scores/this merge/{task}": score for task, score in {**last, "mean": report.mean(last)}.items()}
            self._logger.experiment.summary.update(named)

    def _send_merge(self) -> None:
        import wandb

        run, folder = self._logger.experiment, self._folder / "merge"
        if folder.is_dir():
            merge = wandb.Artifact(f"merge-{run.id}", "merge", metadata={"run directory": str(self._folder)})
            merge.add_dir(str(folder), skip_cache=True, policy="immutable")  # sent from where it lies
            run.log_artifact(merge)
