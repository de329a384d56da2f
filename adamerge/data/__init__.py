"""Unlabeled samples of every task, and labelled ones to evaluate on."""

from adamerge.data.base import MissingSplit, TaskData, TensorTask, is_known, samples_key
from adamerge.data.digits import Digits
from adamerge.data.hf import HFDataset
from adamerge.data.images import ImageFolder
from adamerge.data.stream import StepSampler, StepStream
from adamerge.data.unlabeled import UnlabeledTasks

__all__ = [
    "Digits",
    "HFDataset",
    "ImageFolder",
    "MissingSplit",
    "StepSampler",
    "StepStream",
    "TaskData",
    "TensorTask",
    "UnlabeledTasks",
    "is_known",
    "samples_key",
]
