"""Data: Omniglot, synthetic glyphs where it is not there, and few-shot episodes."""

from mann_ext.data.characters import Characters, DataError, load_characters
from mann_ext.data.episodes import IMAGE_SIZE, Episodes, EpisodeSampler
from mann_ext.data.omniglot import Omniglot, santoro_test_classes
from mann_ext.data.synthetic import synthetic_characters

__all__ = [
    "IMAGE_SIZE",
    "Characters",
    "DataError",
    "EpisodeSampler",
    "Episodes",
    "Omniglot",
    "load_characters",
    "santoro_test_classes",
    "synthetic_characters",
]
