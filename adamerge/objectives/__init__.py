"""Objectives: named scalars to minimise, each with what it needs."""

from adamerge.objectives.base import Objective
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.supervised import Supervised

__all__ = ["Entropy", "Objective", "Supervised"]
