"""Merge rules: learnables and how they turn the base and the task vectors into merged weights."""

from adamerge.rules.base import MergeRule
from adamerge.rules.coefficients import LayerWise, TaskWise
from adamerge.rules.concrete import Concrete

__all__ = ["Concrete", "LayerWise", "MergeRule", "TaskWise"]
