from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from adamerge.data.base import MissingSplit, TaskData
from adamerge.data.order import by_length
from adamerge.data.prepared import Prepared, Preparer
from adamerge.data.stream import Collate, Slot, StepSampler, StepStream, Tables
from adamerge.naming import check_task_names
from adamerge.recorded import Recorded
from adamerge.types import Batch, InputError, raise_all


class _Scored(NamedTuple):
    tasks: tuple[str, ...]
    no_split: list[str]
    no_labels: list[str]


class UnlabeledTasks(Recorded, pl.LightningDataModule):
    """The tasks' data: an endless stream of unlabeled batches to adapt on, and labelled samples to evaluate on.

    Args:
        tasks: Data per task; the names are those of the experts. An expert without data is merged too.
        batch_size: Samples per task, step and rank.
        split: The split adapted on; its labels are not looked at unless an objective is supervised.
        eval_split: The split evaluated on; tasks without it, or without labels in it, are not scored; null for none.
        eval_batch_size: Samples per forward in evaluation.
        num_workers: Processes that prepare batches; each prepares whole steps.
        cache_limit: Memory for decoded samples, in GB on each rank; a split that does not fit is decoded every time.
            Also the disk space for what experts and a fixed merge say of the samples; what does not fit is computed
            every time.
        bucket_by_length: Let texts of like length share a batch.
        seed: Seeds the order of the samples and any randomness in them; by default the run's seed.

    Raises:
        InputError: No tasks, a name that is none, or a size below 1.
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
        bucket_by_length: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not tasks:
            raise InputError("`data.tasks` is empty; name at least one task.")
        check_task_names(tasks, "`data.tasks`")
        if batch_size < 1 or eval_batch_size < 1:
            raise InputError(
                f"`data.batch_size` is {batch_size} and `data.eval_batch_size` {eval_batch_size}; both are at least 1."
            )
        self.tasks, self.batch_size, self.split, self.eval_split = dict(tasks), batch_size, split, eval_split
        self.eval_batch_size, self.num_workers, self.seed = eval_batch_size, num_workers, seed
        self.cache_limit, self.bucket_by_length = cache_limit, bucket_by_length
        self.labels = False  # set by the run when an objective needs labels
        self.slot: Slot | None = None  # set by the run: which tasks a step serves
        self.inputs = False  # set by the run when the samples themselves are wanted beside what `tables` says of them
        self.tables: Tables = {}  # set by the run: what is known of the samples of `split` beforehand
        self.preparer: Preparer | None = None  # set by the run: how the backbone takes a raw sample of a task
        self.collate: Collate = default_collate  # set by the run: how the backbone takes several
        self._splits: dict[str, dict[str, Dataset[Any]]] = {}
        self._scored: dict[str, _Scored] = {}  # by split
        self._cached = 0  # bytes

    def prepared_by(self, preparer: Preparer, collate: Collate = default_collate) -> "UnlabeledTasks":
        """The same data for one run, whose samples go through `prepare` and `collate`.

        Nothing prepared for another run is shared.
        """
        own = copy(self)
        own.preparer, own.collate, own._splits, own._scored, own._cached = preparer, collate, {}, {}, 0
        return own

    @property
    def classes(self) -> dict[str, Sequence[str]]:
        """The class names of each task; none where they are not known."""
        return {task: data.classes for task, data in self.tasks.items()}

    @property
    def num_classes(self) -> dict[str, int]:
        """C per task; 0 where it is not known."""
        return {task: len(data.classes) for task, data in self.tasks.items()}

    def datasets(self, split: str) -> dict[str, Dataset[Any]]:
        """Every task's samples of a split, opened once.

        Raises:
            InputError: A task has no such split, or none in it; all such tasks at once.
        """
        problems, found = [], {}
        for task in self.tasks:
            try:
                found[task] = self._open(split, task)
            except InputError as error:
                problems.append(str(error))
        raise_all(problems, "the data")
        return found

    def _open(self, split: str, task: str) -> Dataset[Any]:
        held, data = self._splits.setdefault(split, {}), self.tasks[task]
        if task in held:
            return held[task]
        try:
            samples = data.split(split)
            if len(samples) > 0 and self.preparer is not None:  # type: ignore[arg-type]
                limit = int(1e9 * self.cache_limit) - self._cached if data.repeatable else 0
                samples = Prepared(samples, self.preparer(task), limit)
                self._cached += samples.size
        except InputError as error:
            raise (MissingSplit if isinstance(error, MissingSplit) else InputError)(
                f"Task '{task}': {error}"
            ) from error
        if len(samples) == 0:  # type: ignore[arg-type]
            raise InputError(f"Task '{task}' is empty: its split '{split}' has no samples.")
        held[task] = samples
        return samples

    # --- labels, which some tasks may lack

    def check_labels(self) -> list[str]:
        """The tasks whose samples to adapt on have no labels, for objectives that need them.

        Raises:
            InputError: No task has any.
        """
        bare = [task for task, samples in self.datasets(self.split).items() if not self._has_labels(samples)]
        if len(bare) == len(self.tasks):
            raise InputError(
                f"An objective needs labels, but the split '{self.split}' of {', '.join(bare)} has none; adapt on "
                "another `data.split`, or minimise the entropy."
            )
        return bare

    def _has_labels(self, samples: Dataset[Any]) -> bool:
        """Tell whether the data have labels: by their own word, else by a few samples, since labels may be made."""
        if getattr(samples, "labelled", None):
            return True
        size = len(samples)  # type: ignore[arg-type]
        for index in sorted({place * (size - 1) // 7 for place in range(8)}):
            label = self.collate([samples[index]]).get("label")
            if label is not None and (not isinstance(label, Tensor) or bool((label >= 0).any())):
                return True
        return False

    @property
    def scored(self) -> tuple[str, ...]:
        """The tasks that are scored, in order: those with labels in the evaluation split; none where that is null.

        Raises:
            InputError: No task has that split, or labels in it; or it cannot be read.
        """
        return self._scoring().tasks

    def scored_samples(self) -> dict[str, Dataset[Any]]:
        """The samples of the evaluation split, of every task that is scored."""
        return {task: self._open(str(self.eval_split), task) for task in self.scored}

    def unscored(self) -> list[str]:
        """Return one line for each reason why tasks are not scored, with their names."""
        found = self._scoring()
        said = {f"no split '{self.eval_split}'": found.no_split, "no labels": found.no_labels}
        return [f"Not scored, {why}: {', '.join(tasks)}" for why, tasks in said.items() if tasks]

    def _scoring(self) -> _Scored:
        split = self.eval_split
        if split is None:
            return _Scored((), [], [])
        if split not in self._scored:
            self._scored[split] = self._find_scored(split)
        return self._scored[split]

    def _find_scored(self, split: str) -> _Scored:
        absent: dict[str, str] = {}
        bare: dict[str, str] = {}
        wrong: dict[str, str] = {}
        for task in self.tasks:
            try:
                samples = self._open(split, task)
                if not self._has_labels(samples):
                    bare[task] = f"Task '{task}' is scored on samples without labels; set `data.eval_split` to null."
                    self._forget(split, task)
            except MissingSplit as error:
                absent[task] = str(error)
            except InputError as error:
                wrong[task] = str(error)
        scored = tuple(task for task in self.tasks if task not in {**absent, **bare, **wrong})
        raise_all((wrong if scored else {**absent, **bare, **wrong}).values(), "the data")
        return _Scored(scored, list(absent), list(bare))

    def _forget(self, split: str, task: str) -> None:
        """Give the memory back that was set aside for samples that are not needed."""
        if split != self.split:
            samples = self._splits[split].pop(task)
            self._cached -= getattr(samples, "size", 0)

    def transductive(self) -> list[str]:
        """The tasks that are scored on the very samples adapted on, as far as that can be known."""
        if self.eval_split is None:
            return []
        here = {task: (self._open(self.split, task), self._open(self.eval_split, task)) for task in self.scored}
        return [task for task, (one, other) in here.items() if self.split == self.eval_split or _are_same(one, other)]

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
            collate=self.collate,
            slot=self.slot,
            tables=self.tables,
            bucket_by_length=self.bucket_by_length,
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
        """One loader per scored task over this rank's share of the evaluation split; no sample stands in two shares."""
        loaders: dict[str, DataLoader[Batch]] = {}
        if self.eval_split is None:
            return loaders
        sets = self.scored_samples()
        small = [task for task, dataset in sets.items() if len(dataset) < world_size]  # type: ignore[arg-type]
        if small:
            raise InputError(
                f"The split '{self.eval_split}' of {', '.join(small)} has fewer samples than there are ranks "
                f"({world_size}); use fewer `trainer.devices`, or set `data.eval_split` to null."
            )
        for task, dataset in sets.items():
            share = Subset(dataset, self._eval_order(dataset, rank, world_size))
            loaders[task] = DataLoader(
                share, batch_size=self.eval_batch_size, num_workers=self.num_workers, collate_fn=self.collate
            )
        return loaders

    def _eval_order(self, dataset: Dataset[Any], rank: int, world_size: int) -> Sequence[int]:
        """A rank's share; texts of like length stand together, in batches that are shuffled: the first few may do."""
        share = range(rank, len(dataset), world_size)  # type: ignore[arg-type]
        lengths = getattr(dataset, "lengths", None) if self.bucket_by_length else None
        if lengths is None:
            return share
        generator = torch.Generator().manual_seed(0)
        order_N = torch.arange(share.start, share.stop, share.step)[torch.randperm(len(share), generator=generator)]
        found: list[int] = by_length(
            order_N, torch.as_tensor(lengths), self.eval_batch_size, start=0, generator=generator
        ).tolist()
        return found

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        assert self.trainer is not None
        return list(self.eval_loaders(self.trainer.global_rank, self.trainer.world_size).values())


def _are_same(one: Dataset[Any], other: Dataset[Any]) -> bool:
    known = getattr(one, "fingerprint", None) if len(one) == len(other) else None  # type: ignore[arg-type]
    return known is not None and known == getattr(other, "fingerprint", None)
