"""Backbones: build the network, take features from it, find the heads."""

from adamerge.backbones.base import Backbone
from adamerge.backbones.module import Module
from adamerge.backbones.open_clip import OpenCLIP

__all__ = ["Backbone", "Module", "OpenCLIP"]
