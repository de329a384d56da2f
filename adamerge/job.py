"""All that one run is asked to do."""

from dataclasses import dataclass, field
from typing import Any

from adamerge.data import UnlabeledTasks
from adamerge.recipe import Recipe

TRAINER_DEFAULTS: dict[str, Any] = {
    **{"max_steps": 500, "max_epochs": -1, "log_every_n_steps": 10, "num_sanity_val_steps": 0},
    **{"val_check_interval": 100, "check_val_every_n_epoch": None, "enable_model_summary": False},
}


@dataclass(frozen=True)
class RunOptions:
    """Where a run goes and what it does beside training.

    Args:
        root: Folder of all runs.
        name: Folder of this run's kin under the root; each run has its own, named by its time, below.
        dir: Exactly this directory instead; it must not exist yet.
        baselines: Score the base, the average, task arithmetic, TIES and the experts first.
        checkpoint_every: Optimiser steps between checkpoints to resume from.
        plot_every: Optimiser steps between heatmaps of the coefficients, for loggers that show images (W&B); 0 for the
            last one only.
    """

    root: str = "runs"
    name: str = "merge"
    dir: str | None = None
    baselines: bool = True
    checkpoint_every: int = 100
    plot_every: int = 100


@dataclass
class Job:
    """All that one run is asked to do."""

    recipe: Recipe
    data: UnlabeledTasks
    trainer: dict[str, Any] = field(default_factory=dict)
    run: RunOptions = field(default_factory=RunOptions)
    ckpt_path: str | None = None
    seed_everything: int = 0
    config: str | None = None  # the resolved configuration, as text
