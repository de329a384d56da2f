"""Backbones: build the network, take features from it, find the heads."""

from adamerge.backbones.base import Backbone
from adamerge.backbones.classifiers import ImageClassifier, TextClassifier, TokenClassifier
from adamerge.backbones.clip import CLIP
from adamerge.backbones.encoders import SentenceEncoder, Seq2Seq
from adamerge.backbones.module import Module
from adamerge.backbones.open_clip import OpenCLIP

__all__ = [
    "CLIP",
    "Backbone",
    "ImageClassifier",
    "Module",
    "OpenCLIP",
    "SentenceEncoder",
    "Seq2Seq",
    "TextClassifier",
    "TokenClassifier",
]
