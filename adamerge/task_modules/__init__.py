"""Per-task parts of the model: between the merged features and the loss."""

from adamerge.task_modules.base import TaskModule
from adamerge.task_modules.head import AsIs, ClassifierHead, LinearHead, ZeroShotHead
from adamerge.task_modules.surgery import Surgery
from adamerge.task_modules.tint import Tint

__all__ = ["AsIs", "ClassifierHead", "LinearHead", "Surgery", "TaskModule", "Tint", "ZeroShotHead"]
