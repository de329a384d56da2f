"""The endless training stream: what step k holds is a pure function of (seed, task, rank, k)."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler, default_collate

from adamerge.backbones.base import num_answers
from adamerge.data.order import by_length
from adamerge.seeding import seed_of
from adamerge.types import KEPT, UNLABELED, Batch

Slot = Callable[[int], tuple[int, Sequence[str]]]
Collate = Callable[[list[Any]], Any]
Tables = Mapping[str, Mapping[str, Any]]


class StepSampler(SequentialSampler):
    """Counts training steps from where the run stands, without end; a run resumes at any k with any number of workers.

    Args:
        start: Asked at every `iter`: the first k.
        cycle: Repeat the first so many steps forever (`overfit_batches`); 0 for never.
    """

    def __init__(self, start: Callable[[], int], *, cycle: int = 0) -> None:
        self._start, self._cycle = start, cycle

    def __len__(self) -> int:
        raise TypeError("The training stream has no end; `trainer.max_steps` says when to stop.")

    def __iter__(self) -> Iterator[int]:
        k = self._start()
        while True:
            yield k % self._cycle if self._cycle else k
            k += 1


class StepStream(Dataset[Mapping[str, Batch]]):
    """Item k is the batch of every task for step k on one rank: {task: {"input": [B, …], …}}.

    A task's samples come in an endless sequence of seeded permutations. Step k of all W ranks together takes the next W
    * B of them, dealt out in turn: ranks never share a position, and W ranks see what one rank with W * B samples per
    step sees. An optimiser step that serves some of the tasks takes theirs alone, from the step that `slot` names.

    Where a dataset knows its samples' `lengths`, those of like length share a batch: each permutation is drawn so that
    the W * B samples of a step, those between two permutations aside, are neighbours among the 64 * W * B about them.

    Args:
        splits: Map-style dataset per task.
        batch_size: B, samples per task on this rank.
        seed: Seeds the permutations and, per sample position, whatever randomness a dataset draws from torch, numpy or
            random.
        rank: This rank.
        world_size: W.
        labels: Keep the entry "label"; where there is none, it says so: -100 for every answer.
        inputs: Read the samples also where merged features stand in their place.
        slot: From an optimiser step to the step whose batches it takes, and the tasks it takes them of; by default its
            own, of all tasks.
        tables: Per task what is known of all its samples beforehand, [N, …] or a list of such, by the name of an entry;
            merged features among them stand in the place of the samples themselves.
        collate: Makes a batch of samples.
        bucket_by_length: Whether `lengths` count.
    """

    def __init__(
        self,
        splits: Mapping[str, Dataset[Any]],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        labels: bool = False,
        inputs: bool = False,
        slot: Slot | None = None,
        tables: Tables | None = None,
        collate: Collate = default_collate,
        bucket_by_length: bool = True,
    ) -> None:
        self._splits, self._batch_size, self._seed = dict(splits), batch_size, seed
        self._rank, self._world_size, self._labels = rank, world_size, labels
        self._inputs, self._slot, self._tables, self._collate = inputs, slot, tables or {}, collate
        self._bucket = bucket_by_length
        self._permutation = lru_cache(maxsize=2 * len(self._splits))(self._draw)

    def __getitem__(self, k: int) -> Mapping[str, Batch]:
        step, tasks = self._slot(k) if self._slot else (k, tuple(self._splits))
        with _kept_random_state():
            return {task: self._batch(task, self.positions(step)) for task in tasks}

    def _batch(self, task: str, positions: range) -> Batch:
        table = self._tables.get(task, {})
        read = self._labels or self._inputs or KEPT not in table
        batch = self._collate(self._samples(task, positions)) if read else {}
        if self._labels and "label" not in batch:
            batch = {**batch, "label": torch.full((num_answers(batch),), UNLABELED)}
        if not table:
            return batch
        index_B = self._indices(task, positions)
        known = {
            key: [v[index_B] for v in value] if isinstance(value, list) else value[index_B]
            for key, value in table.items()
        }
        return {**batch, **known}

    def positions(self, k: int) -> range:
        """Where in each task's endless sequence this rank's samples of step k stand."""
        first = k * self._batch_size * self._world_size
        return range(first + self._rank, first + self._batch_size * self._world_size, self._world_size)

    def index(self, task: str, position: int) -> int:
        """Which sample of the task's dataset stands at a position."""
        epoch, place = divmod(position, len(self._splits[task]))  # type: ignore[arg-type]
        return int(self._permutation(task, epoch)[place])

    def _indices(self, task: str, positions: range) -> torch.Tensor:
        """Which samples stand at positions, [B]."""
        size = len(self._splits[task])  # type: ignore[arg-type]
        position_B = torch.arange(positions.start, positions.stop, positions.step)
        epochs = range(positions.start // size, (positions[-1] // size) + 1)
        orders = torch.cat([self._permutation(task, epoch) for epoch in epochs])
        return orders[position_B - epochs.start * size]

    def _draw(self, task: str, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed_of(self._seed, "order", task, epoch))
        size = len(self._splits[task])  # type: ignore[arg-type]
        order_N = torch.randperm(size, generator=generator)
        lengths = getattr(self._splits[task], "lengths", None) if self._bucket else None
        if lengths is None:
            return order_N
        batch = self._batch_size * self._world_size
        start = -epoch * size % batch  # an epoch begins wherever the one before has ended
        return by_length(order_N, torch.as_tensor(lengths), batch, start=start, generator=generator)

    def _samples(self, task: str, positions: range) -> list[Mapping[str, Any]]:
        split: Any = self._splits[task]
        if getattr(split, "remembers", False):
            samples = split.__getitems__(self._indices(task, positions).tolist())  # data sets read several faster
        else:
            samples = [self._drawn(task, position) for position in positions]
        if self._labels:
            return samples
        return [{key: value for key, value in sample.items() if key != "label"} for sample in samples]

    def _drawn(self, task: str, position: int) -> Mapping[str, Any]:
        seed = seed_of(self._seed, "sample", task, position)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        sample: Mapping[str, Any] = self._splits[task][self.index(task, position)]
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_permutation"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._permutation = lru_cache(maxsize=2 * len(self._splits))(self._draw)


class _kept_random_state:
    """The global generators come out of the block as they went in."""

    def __enter__(self) -> None:
        self._kept = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def __exit__(self, *exception: object) -> None:
        torch.set_rng_state(self._kept[0])
        random.setstate(self._kept[1])
        np.random.set_state(self._kept[2])
