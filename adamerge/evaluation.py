"""Scores of a model on labelled data, and of the baselines every merge is shown beside."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from adamerge.backbones.base import to_device
from adamerge.merged import MergedModel
from adamerge.multitask import MultiTaskModel
from adamerge.rules import TaskWise
from adamerge.task_modules import AsIs
from adamerge.task_vectors import TaskVectors
from adamerge.transforms import ElectSign, Trim
from adamerge.types import UNLABELED, Batch, InputError, some

Scores = dict[str, float]  # task -> accuracy in [0, 1]


class Collapse(NamedTuple):
    """A task whose predictions gather on one class far more often than its samples do."""

    task: str
    predicted: float  # share of the most predicted class
    true: float  # share of the most frequent class


class Counts(NamedTuple):
    """How many answers were right, how many truly were of each class, and how many were said to be."""

    correct: Tensor  # []
    true_C: Tensor
    predicted_C: Tensor


class Confusion(Metric):
    """Counts what a score and a collapse are made from, over all ranks; of vocabularies too: 2 C + 1 numbers.

    Answers labelled -100 do not count. Nothing here waits for the device.

    Args:
        num_classes: C.
    """

    full_state_update = False
    correct: Tensor
    true_C: Tensor
    predicted_C: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        for name, shape in (("correct", ()), ("true_C", (num_classes,)), ("predicted_C", (num_classes,))):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits_NC: Tensor, label_N: Tensor) -> None:
        """Add N answers."""
        counts_N = label_N != UNLABELED
        label_N, said_N, one_N = label_N.where(counts_N, 0).long(), logits_NC.argmax(-1), counts_N.long()
        self.correct += ((said_N == label_N) & counts_N).sum()
        self.true_C.scatter_add_(0, label_N, one_N)
        self.predicted_C.scatter_add_(0, said_N, one_N)

    def compute(self) -> Counts:
        """What was added up."""
        return Counts(self.correct, self.true_C, self.predicted_C)


def confusion(num_classes: int) -> Confusion:
    """The metric behind every score."""
    return Confusion(num_classes)


def score(task: str, counts: Counts) -> tuple[float, Collapse | None]:
    """Accuracy in [0, 1] and, where the predictions gather on one class, the collapse."""
    total = max(1, int(counts.true_C.sum()))
    collapse = Collapse(task, int(counts.predicted_C.max()) / total, int(counts.true_C.max()) / total)
    collapsed = collapse.predicted > 0.9 and collapse.true < 0.75
    return int(counts.correct) / total, collapse if collapsed else None


def classes_of(model: MultiTaskModel, known: Mapping[str, int], tasks: Sequence[str]) -> dict[str, int]:
    """C of some tasks: as many as their heads give logits, else as many as the data name.

    Raises:
        InputError: Neither is known, or a task's features are embeddings that no classes are told from.
    """
    heads = {task: model.chain(task)[-1] for task in tasks}
    found = {
        task: head.num_classes or (0 if isinstance(head, AsIs) else known.get(task, 0)) for task, head in heads.items()
    }
    unknown = [task for task, number in found.items() if not number]
    if unknown:
        raise InputError(
            f"How many classes {some(unknown)} have is not known: list them in the `classes` of their data, or score "
            "nothing with `data.eval_split` null."
        )
    return found


@torch.inference_mode()
def evaluate(
    model: MultiTaskModel,
    loaders: Mapping[str, Iterable[Batch]],
    num_classes: Mapping[str, int],
    device: torch.device,
    convert: Callable[[Batch], Batch] = lambda batch: batch,
) -> Scores:
    """Accuracy per task over all ranks' shares, each sample once.

    Args:
        model: Answers model(batch, task).
        loaders: Per task this rank's share of the labelled samples.
        num_classes: C per task.
        device: Where the model is.
        convert: Brings a batch into the model's precision.
    """
    model.eval()
    scores = {}
    with model.applied() if isinstance(model, MergedModel) else nullcontext():
        for task, loader in loaders.items():
            metric = confusion(num_classes[task]).to(device)
            for batch in loader:
                _check_labels(task, batch, num_classes[task])
                batch = convert(to_device(batch, device))
                metric.update(model(batch, task=task), batch["label"])
            counts = metric.compute()
            if not counts.true_C.any():
                raise InputError(f"Task '{task}' is scored on samples without labels; set `data.eval_split` to null.")
            scores[task] = score(task, counts)[0]
    return scores


def _check_labels(task: str, batch: Batch, num_classes: int) -> None:
    if "label" not in batch:
        raise InputError(f"Task '{task}' is scored on samples without 'label'; set `data.eval_split` to null.")
    if not isinstance(batch["label"], Tensor):
        raise InputError(f"Task '{task}' is labelled {batch['label'][0]!r}; labels are whole numbers from 0 on.")
    label_N = batch["label"][batch["label"] != UNLABELED]
    if label_N.numel() and not 0 <= int(label_N.min()) <= int(label_N.max()) < num_classes:
        odd = int(label_N.max()) if int(label_N.max()) >= num_classes else int(label_N.min())
        raise InputError(f"Task '{task}' has {num_classes} classes, but a sample is labelled {odd}.")


def baselines(
    model: MergedModel, raw: TaskVectors, scored: Sequence[str] | None = None
) -> Iterator[tuple[str, MergedModel, tuple[str, ...]]]:
    """(name, merge, the tasks it is scored on) of every merge that needs no training, from the untransformed vectors.

    They are task-wise coefficients: all 0, all 1/T, all 0.3 (arXiv 2212.04089), 0.3 after trimming and sign election
    (arXiv 2306.01708, summed), and one 1 for each expert whose task is scored.

    Args:
        model: Lends everything but rule and vectors.
        raw: The task vectors of all T tasks.
        scored: The tasks that are scored; by default all.
    """
    tasks = raw.tasks
    asked = tasks if scored is None else tuple(task for task in tasks if task in scored)
    rule = partial(TaskWise, raw)
    yield "base", model.variant(rule(init=0.0), raw), asked
    yield "average", model.variant(rule(init=1 / len(tasks)), raw), asked
    yield "task arithmetic", model.variant(rule(init=0.3), raw), asked
    ties = raw.transformed([Trim(keep=0.2), ElectSign()])
    yield "TIES", model.variant(TaskWise(ties, init=0.3), ties), asked
    for task in asked:
        yield f"expert {task}", model.variant(rule(init={other: float(other == task) for other in tasks}), raw), (task,)
