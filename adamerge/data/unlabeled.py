from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from adamerge.data.base import TaskData
from adamerge.data.prepared import Prepare, Prepared
from adamerge.data.stream import Slot, StepSampler, StepStream, Tables
from adamerge.recorded import Recorded
from adamerge.types import Batch, InputError, raise_all


class UnlabeledTasks(Recorded, pl.LightningDataModule):
    """The tasks' data: an endless stream of unlabeled batches to adapt on, and labelled samples to evaluate on.

    Args:
        tasks: Data per task; the names are those of the experts.
        batch_size: Samples per task, step and rank.
        split: The split adapted on; its labels are not looked at unless an objective is supervised.
        eval_split: The split evaluated on; none for tasks without labels, then nothing is scored.
        eval_batch_size: Samples per forward in evaluation.
        num_workers: Processes that prepare batches; each prepares whole steps.
        cache_limit: Memory for decoded samples, in GB on each rank; a split that does not fit is decoded every time.
            Also the disk space for what experts and a fixed merge say of the samples; what does not fit is computed
            every time.
        seed: Seeds the order of the samples and any randomness in them; by default the run's seed.

    Raises:
        InputError: No tasks, or a size below 1.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskData],
        *,
        batch_size: int = 16,
        split: str = "train",
        eval_split: str | None = "test",
        eval_batch_size: int = 256,
        num_workers: int = 0,
        cache_limit: float = 4.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not tasks:
            raise InputError("`data.tasks` is empty; name at least one task.")
        if batch_size < 1 or eval_batch_size < 1:
            raise InputError(
                f"`data.batch_size` is {batch_size} and `data.eval_batch_size` {eval_batch_size}; both are at least 1."
            )
        self.tasks, self.batch_size, self.split, self.eval_split = dict(tasks), batch_size, split, eval_split
        self.eval_batch_size, self.num_workers, self.seed = eval_batch_size, num_workers, seed
        self.cache_limit = cache_limit
        self.labels = False  # set by the run when an objective needs labels
        self.slot: Slot | None = None  # set by the run: which tasks a step serves
        self.inputs = False  # set by the run when the samples themselves are wanted beside what `tables` says of them
        self.tables: Tables = {}  # set by the run: what is known of the samples of `split` beforehand
        self.prepare: Prepare | None = None  # set by the run: how the backbone takes a raw sample
        self._splits: dict[str, dict[str, Dataset[Any]]] = {}
        self._cached = 0  # bytes

    def prepared_by(self, prepare: Prepare) -> "UnlabeledTasks":
        """The same data for one run, whose samples go through `prepare`; nothing prepared for another run is shared."""
        own = copy(self)
        own.prepare, own._splits, own._cached = prepare, {}, 0
        return own

    def check_labels(self) -> None:
        """Look at the first batch of every task, for objectives that need labels.

        Raises:
            InputError: Samples to adapt on have no labels.
        """
        stream = StepStream(self.datasets(self.split), batch_size=self.batch_size, seed=self.seed or 0, labels=True)
        bare = [task for task, batch in stream[0].items() if "label" not in batch or int(batch["label"].max()) < 0]
        if bare:
            raise InputError(
                f"An objective needs labels, but the split '{self.split}' of {', '.join(bare)} has none; adapt on "
                "another `data.split`, or minimise the entropy."
            )

    @property
    def classes(self) -> dict[str, Sequence[str]]:
        """The class names of each task."""
        return {task: data.classes for task, data in self.tasks.items()}

    @property
    def num_classes(self) -> dict[str, int]:
        """C per task."""
        return {task: len(data.classes) for task, data in self.tasks.items()}

    def datasets(self, split: str) -> dict[str, Dataset[Any]]:
        """Every task's samples of a split, opened once.

        Raises:
            InputError: A task has no such split, or none in it; all such tasks at once.
        """
        if split not in self._splits:
            opened: dict[str, Dataset[Any]] = {}
            raise_all(self._open(split, opened), "the data")
            self._splits[split] = opened
        return self._splits[split]

    def _open(self, split: str, opened: dict[str, Dataset[Any]]) -> Iterator[str]:
        for task, data in self.tasks.items():
            try:
                samples = data.split(split)
                if len(samples) == 0:  # type: ignore[arg-type]
                    yield f"Task '{task}' is empty: its split '{split}' has no samples."
                elif self.prepare is not None:
                    limit = int(1e9 * self.cache_limit) - self._cached if data.repeatable else 0
                    samples = Prepared(samples, self.prepare, limit)
                    self._cached += samples.size
                opened[task] = samples
            except InputError as error:
                yield f"Task '{task}': {error}"

    def stream(self, rank: int = 0, world_size: int = 1) -> StepStream:
        """The training stream as one rank sees it."""
        return StepStream(
            self.datasets(self.split),
            batch_size=self.batch_size,
            seed=self.seed or 0,
            rank=rank,
            world_size=world_size,
            labels=self.labels,
            inputs=self.inputs,
            slot=self.slot,
            tables=self.tables,
        )

    def train_dataloader(self) -> Iterable[Mapping[str, Batch]]:
        trainer = self.trainer
        assert trainer is not None
        sampler = StepSampler(
            lambda: trainer.fit_loop.epoch_loop.batch_progress.total.processed, cycle=int(trainer.overfit_batches)
        )
        stream = self.stream(trainer.global_rank, trainer.world_size)
        return DataLoader(
            stream, batch_size=None, sampler=sampler, num_workers=self.num_workers, pin_memory=torch.cuda.is_available()
        )

    def eval_loaders(self, rank: int = 0, world_size: int = 1) -> dict[str, DataLoader[Batch]]:
        """One loader per task over this rank's share of the evaluation split; no sample stands in two shares."""
        loaders: dict[str, DataLoader[Batch]] = {}
        if self.eval_split is None:
            return loaders
        sets = self.datasets(self.eval_split)
        small = [task for task, dataset in sets.items() if len(dataset) < world_size]  # type: ignore[arg-type]
        if small:
            raise InputError(
                f"The split '{self.eval_split}' of {', '.join(small)} has fewer samples than there are ranks "
                f"({world_size}); use fewer `trainer.devices`, or set `data.eval_split` to null."
            )
        for task, dataset in sets.items():
            share = Subset(dataset, range(rank, len(dataset), world_size))  # type: ignore[arg-type]
            loaders[task] = DataLoader(share, batch_size=self.eval_batch_size, num_workers=self.num_workers)
        return loaders

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        assert self.trainer is not None
        return list(self.eval_loaders(self.trainer.global_rank, self.trainer.world_size).values())
