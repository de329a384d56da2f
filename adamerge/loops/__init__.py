"""Loops: how one optimiser step goes through the tasks."""

from adamerge.loops.base import Loop
from adamerge.loops.joint import Joint

__all__ = ["Joint", "Loop"]
