"""Objectives: named scalars to minimise, each with what it needs."""

from adamerge.objectives.base import Objective
from adamerge.objectives.distillation import Distillation, FeatureDistillation
from adamerge.objectives.diversity import Diversity
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.info_nce import InfoNCE
from adamerge.objectives.pseudo_label import PseudoLabel
from adamerge.objectives.supervised import Supervised

__all__ = [
    "Distillation",
    "Diversity",
    "Entropy",
    "FeatureDistillation",
    "InfoNCE",
    "Objective",
    "PseudoLabel",
    "Supervised",
]
