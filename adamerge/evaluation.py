"""Scores of a model on labelled data, and of the baselines every merge is shown beside."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from adamerge.backbones.base import to_device
from adamerge.merged import MergedModel
from adamerge.multitask import MultiTaskModel
from adamerge.rules import TaskWise
from adamerge.task_vectors import TaskVectors
from adamerge.transforms import ElectSign, Trim
from adamerge.types import UNLABELED, Batch, InputError

Scores = dict[str, float]  # task -> accuracy in [0, 1]


class Collapse(NamedTuple):
    """A task whose predictions gather on one class far more often than its samples do."""

    task: str
    predicted: float  # share of the most predicted class
    true: float  # share of the most frequent class


def confusion(num_classes: int) -> MulticlassConfusionMatrix:
    """The metric behind every score: counts [C true, C predicted], added up over ranks; label -100 does not count."""
    return MulticlassConfusionMatrix(num_classes=num_classes, ignore_index=UNLABELED)


def score(task: str, table_CC: Tensor) -> tuple[float, Collapse | None]:
    """Accuracy in [0, 1] and, where the predictions gather on one class, the collapse."""
    total = max(1, int(table_CC.sum()))
    collapse = Collapse(task, int(table_CC.sum(0).max()) / total, int(table_CC.sum(1).max()) / total)
    collapsed = collapse.predicted > 0.9 and collapse.true < 0.75
    return int(table_CC.diagonal().sum()) / total, collapse if collapsed else None


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
            scores[task] = score(task, metric.compute())[0]
    return scores


def _check_labels(task: str, batch: Batch, num_classes: int) -> None:
    if "label" not in batch:
        raise InputError(f"Task '{task}' is scored on samples without 'label'; set `data.eval_split` to null.")
    if not isinstance(batch["label"], Tensor):
        raise InputError(f"Task '{task}' is labelled {batch['label'][0]!r}; labels are whole numbers from 0 on.")
    highest, lowest = int(batch["label"].max()), int(batch["label"].min())
    if highest >= num_classes or (lowest < 0 and lowest != UNLABELED):
        odd = highest if highest >= num_classes else lowest
        raise InputError(f"Task '{task}' has {num_classes} classes, but a sample is labelled {odd}.")
    if highest == UNLABELED:
        raise InputError(f"Task '{task}' is scored on samples without labels; set `data.eval_split` to null.")


def baselines(model: MergedModel, raw: TaskVectors) -> Iterator[tuple[str, MergedModel, tuple[str, ...]]]:
    """(name, merge, the tasks it is scored on) of every merge that needs no training, from the untransformed vectors.

    They are task-wise coefficients: all 0, all 1/T, all 0.3 (arXiv 2212.04089), 0.3 after trimming and sign election
    (arXiv 2306.01708, summed), and one 1 for each expert.
    """
    tasks = raw.tasks
    rule = partial(TaskWise, raw)
    yield "base", model.variant(rule(init=0.0), raw), tasks
    yield "average", model.variant(rule(init=1 / len(tasks)), raw), tasks
    yield "task arithmetic", model.variant(rule(init=0.3), raw), tasks
    ties = raw.transformed([Trim(keep=0.2), ElectSign()])
    yield "TIES", model.variant(TaskWise(ties, init=0.3), ties), tasks
    for task in tasks:
        yield f"expert {task}", model.variant(rule(init={other: float(other == task) for other in tasks}), raw), (task,)
