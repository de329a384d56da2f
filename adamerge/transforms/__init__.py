"""Transforms of task vectors: applied once at load, without learnables."""

from adamerge.transforms.base import Transform
from adamerge.transforms.elect_sign import ElectSign
from adamerge.transforms.trim import Trim

__all__ = ["ElectSign", "Transform", "Trim"]
