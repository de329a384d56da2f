"""Per-task parts of the model: between the merged features and the loss."""

from adamerge.task_modules.base import TaskModule
from adamerge.task_modules.head import LinearHead, ZeroShotHead

__all__ = ["LinearHead", "TaskModule", "ZeroShotHead"]
