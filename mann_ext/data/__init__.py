"""Data: Omniglot, synthetic glyphs where it is not there, few-shot episodes, and functions."""

from mann_ext.data.characters import Characters, DataError, load_characters
from mann_ext.data.episodes import IMAGE_SIZE, Episodes, EpisodeSampler
from mann_ext.data.functions import (
    Functions,
    FunctionSampler,
    GaussianProcess,
    GaussianProcessSampler,
    QuadraticSampler,
)
from mann_ext.data.omniglot import Omniglot, santoro_test_classes
from mann_ext.data.synthetic import synthetic_characters

__all__ = [
    "IMAGE_SIZE",
    "Characters",
    "DataError",
    "EpisodeSampler",
    "Episodes",
    "FunctionSampler",
    "Functions",
    "GaussianProcess",
    "GaussianProcessSampler",
    "Omniglot",
    "QuadraticSampler",
    "load_characters",
    "santoro_test_classes",
    "synthetic_characters",
]
