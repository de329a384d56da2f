"""Loops: how one optimiser step goes through the tasks."""

from adamerge.loops.base import Loop
from adamerge.loops.bilevel import Bilevel
from adamerge.loops.joint import Joint
from adamerge.loops.per_task import PerTask

__all__ = ["Bilevel", "Joint", "Loop", "PerTask"]
