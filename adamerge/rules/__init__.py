"""Merge rules: learnables and how they turn the base and the task vectors into merged weights."""

from adamerge.rules.base import MergeRule
from adamerge.rules.coefficients import LayerWise, TaskWise

__all__ = ["LayerWise", "MergeRule", "TaskWise"]
