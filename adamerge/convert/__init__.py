"""Pickled checkpoints as safetensors, read without running anything of what they name."""

from adamerge.convert.converting import Converted, convert

__all__ = ["Converted", "convert"]
