"""Data: Omniglot, MNIST, miniImageNet, synthetic glyphs where Omniglot is not there, few-shot
episodes and tasks, and functions."""

from mann_ext.data.characters import Characters, DataError, load_characters
from mann_ext.data.episodes import IMAGE_SIZE, Episodes, EpisodeSampler
from mann_ext.data.functions import (
    Functions,
    FunctionSampler,
    GaussianProcess,
    GaussianProcessSampler,
    QuadraticSampler,
)
from mann_ext.data.images import permute_pixels, quarter_turns, shrink
from mann_ext.data.mini_imagenet import LabelledImages, mini_imagenet
from mann_ext.data.mnist import MNIST
from mann_ext.data.omniglot import Omniglot, santoro_test_classes
from mann_ext.data.one_shot_runs import OneShotRuns, one_shot_runs
from mann_ext.data.synthetic import synthetic_characters
from mann_ext.data.tasks import Tasks, TaskSampler

__all__ = [
    "IMAGE_SIZE",
    "MNIST",
    "Characters",
    "DataError",
    "EpisodeSampler",
    "Episodes",
    "FunctionSampler",
    "Functions",
    "GaussianProcess",
    "GaussianProcessSampler",
    "LabelledImages",
    "Omniglot",
    "OneShotRuns",
    "QuadraticSampler",
    "TaskSampler",
    "Tasks",
    "load_characters",
    "mini_imagenet",
    "one_shot_runs",
    "permute_pixels",
    "quarter_turns",
    "santoro_test_classes",
    "shrink",
    "synthetic_characters",
]
