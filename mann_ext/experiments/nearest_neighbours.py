"""Nearest neighbours within an episode, the baseline of Santoro et al. (2016), supplement 9.1.2."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mann_ext import evaluation
from mann_ext.data import IMAGE_SIZE
from mann_ext.experiments.config import ConfigError
from mann_ext.experiments.few_shot import Accuracy, FewShot, accuracy, count_right
from mann_ext.experiments.santoro import SantoroConfig
from mann_ext.experiments.santoro_reproductions import NeighbourConfig

PIXELS = IMAGE_SIZE**2
CODE = 32
NOTHING = -1
"""The prediction at the first step of an episode, when nothing has been stored yet."""


def measure(config: NeighbourConfig, episodes: int) -> dict[str, Any]:
    """Accuracy by instance on held-out classes, images unmoved and moved, ready for JSON."""
    encode: Callable[[Tensor], Tensor] = lambda images: images  # noqa: E731
    trained: dict[str, Any] = {}
    started = time.perf_counter()
    if config.features == "autoencoder":
        model, loss = train_autoencoder(config)
        encode = model.encoder
        trained = {
            "autoencoder_minibatches": config.run.minibatches,
            "autoencoder_loss": loss,
            "autoencoder_seconds": round(time.perf_counter() - started, 1),
        }
    started = time.perf_counter()
    task = _task(config)
    found = held_out_accuracy(task, encode, episodes)
    moved = held_out_accuracy(_task(config, augment_test=True), encode, episodes)
    return {
        **found.summary(),
        "moved": moved.summary(),
        "data": task.data_name,
        **trained,
        "evaluation_seconds": round(time.perf_counter() - started, 1),
        **evaluation.provenance(config),
    }


def held_out_accuracy(task: FewShot, encode: Callable[[Tensor], Tensor], episodes: int) -> Accuracy:
    """Accuracy on at least ``episodes`` episodes; ``encode`` makes features (..., F) of images
    (..., 400)."""
    counts = []
    for batch in task.held_out_episodes(episodes):
        with torch.inference_mode():
            features = encode(batch.inputs[..., :PIXELS]).numpy()
        # Strings are different for different classes, so knowing the class is knowing the string.
        classes = batch.classes.numpy()
        predicted = np.stack(
            [predictions(features[:, b], classes[:, b]) for b in range(classes.shape[1])], 1
        )
        counts.append(count_right(torch.from_numpy(predicted == classes), batch.instances))
    return accuracy(counts)


def _task(config: NeighbourConfig, **episodes: Any) -> FewShot:
    changed = replace(config.episodes, **episodes)
    return FewShot(SantoroConfig(episodes=changed, run=config.run), torch.device("cpu"))


def predictions(features: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    """The label of the nearest earlier point (Euclidean), for each point of an episode.

    A point is stored with its label after its own prediction. The first has nothing to be compared
    with: its prediction is NOTHING.

    Args:
        features: (T, F).
        labels: (T,) integers from 0.
    """
    found = np.full_like(labels, NOTHING)
    for t in range(1, len(labels)):
        found[t] = nearest(features[:t], labels[:t], features[t : t + 1])[0]
    return found


def nearest(points: NDArray[Any], labels: NDArray[Any], queries: NDArray[Any]) -> NDArray[Any]:
    """The label of the nearest point (Euclidean) to each query.

    Args:
        points: (T, F).
        labels: (T,) integers.
        queries: (Q, F).

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn import config_context
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError:
        raise ConfigError(
            "nearest neighbours need scikit-learn: pip install 'mann_ext[baselines]'"
        ) from None
    settings = config_context(assume_finite=True, skip_parameter_validation=True)
    with settings, warnings.catch_warnings():
        # Many labels among few points look like a regression to scikit-learn.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        classifier = KNeighborsClassifier(n_neighbors=1, algorithm="brute")
        found: NDArray[Any] = classifier.fit(points, labels).predict(queries)
    return found


class Autoencoder(nn.Module):
    """400 pixels -> 200 -> 200 -> a code of 32 numbers, and back to logits of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _layers(PIXELS, 200, 200, CODE)
        self.decoder = _layers(CODE, 200, 200, PIXELS)

    def forward(self, images: Tensor) -> Tensor:
        """images (..., 400) -> logits of their pixels (..., 400)."""
        logits: Tensor = self.decoder(self.encoder(images))
        return logits


def _layers(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.LeakyReLU()]
    return nn.Sequential(*layers[:-1])


def train_autoencoder(config: NeighbourConfig) -> tuple[Autoencoder, float]:
    """Trained on images of the training classes, moved and turned as the networks' are, by the
    cross-entropy of the pixels; and its mean loss a pixel over the last tenth."""
    # The same images whatever the episodes it is used in.
    task = _task(config, ways=1, length=50)
    torch.manual_seed(config.run.seed)
    model = Autoencoder()
    optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    minibatches = config.run.minibatches or 0
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(minibatches, 1))
    last: list[Tensor] = []
    for step in range(minibatches):
        images = task.training_episodes.sample().inputs[..., :PIXELS].flatten(0, 1)
        loss = F.binary_cross_entropy_with_logits(model(images), images)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step >= 0.9 * minibatches:
            last.append(loss.detach())
    return model.eval(), float(torch.stack(last).mean()) if last else float("nan")
