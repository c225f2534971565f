"""The few-shot classification task: its data, its model, its loss and its accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mann_ext import data, models
from mann_ext.data import Episodes, EpisodeSampler
from mann_ext.experiments.config import ConfigError
from mann_ext.experiments.santoro import INSTANCES, EpisodesConfig, ModelConfig, SantoroConfig

LETTERS = 5
"""A string label has five letters, each one of five."""


@dataclass(frozen=True)
class Accuracy:
    """How often each episode's predictions were right, by instance.

    correct, shown: (episodes, INSTANCES) float64; column i is the (i+1)-th time a class is shown.
    """

    correct: Tensor
    shown: Tensor

    @property
    def episodes(self) -> int:
        return self.shown.shape[0]

    def means(self) -> list[float]:
        """Share of right predictions by instance over all episodes; NaN where nothing was shown."""
        return (self.correct.sum(0) / self.shown.sum(0)).tolist()

    def half_widths(self) -> list[float]:
        """Half of the 95 % confidence interval of `means`, with the episode as the sampling unit.

        The predictions within an episode are not independent, so the variance of the ratio
        p = sum_e c_e / sum_e n_e is estimated from the episodes' residuals d_e = c_e - p n_e:
        var p = E / (E - 1) sum_e d_e^2 / (sum_e n_e)^2.
        """
        if self.episodes < 2:
            return [math.nan] * self.shown.shape[1]
        share = self.correct.sum(0) / self.shown.sum(0)
        residual = self.correct - share * self.shown
        variance = residual.square().sum(0) / self.shown.sum(0).square()
        variance *= self.episodes / (self.episodes - 1)
        return (1.959964 * variance.sqrt()).tolist()


class FewShot:
    """The data and the computations of one configuration.

    Args:
        config: what to train.
        device: where the images are kept and the episodes are made.

    Raises:
        ConfigError: the data is missing, or has fewer classes than an episode needs.
    """

    def __init__(self, config: SantoroConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.dtype = torch.float64 if config.run.dtype == "float64" else torch.float32
        self.training_set, self.test_set, self.data_name = load_data(config.episodes, device)

    def model(self) -> nn.Module:
        """A new model, its parameters drawn from torch's random numbers."""
        labels = self.config.episodes
        inputs = LETTERS * LETTERS if labels.labels == "string" else labels.ways
        outputs = inputs
        model = build_model(self.config.model, data.IMAGE_SIZE**2 + inputs, outputs)
        return model.to(self.device, self.dtype)

    def training_episodes(self, seed: int) -> EpisodeSampler:
        """Minibatches of training classes."""
        episodes = self.config.episodes
        return self._sampler(self.training_set, episodes.batch_size, episodes.augment, seed)

    def test_episodes(self, seed: int) -> EpisodeSampler:
        """Minibatches of held-out classes."""
        episodes = self.config.episodes
        return self._sampler(self.test_set, episodes.batch_size, episodes.augment_test, seed)

    def _sampler(self, split: Any, batch_size: int, augment: bool, seed: int) -> EpisodeSampler:
        episodes = self.config.episodes
        return EpisodeSampler(
            split,
            ways=episodes.ways,
            length=episodes.length,
            batch_size=batch_size,
            labels=episodes.labels,
            augment=augment,
            seed=seed,
            device=self.device,
        )

    def loss(self, model: nn.Module, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy of a minibatch, summed over the letters of a string label, and
        its right predictions and showings by instance, (2, INSTANCES)."""
        logits = self.logits(model, episodes)
        targets = episodes.targets
        if targets.dim() == 3:
            logits = logits.unflatten(-1, (LETTERS, LETTERS))
        entropies = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
        tally = count(logits.detach(), episodes).sum(0)
        return entropies / episodes.instances.numel(), tally

    def logits(self, model: nn.Module, episodes: Episodes) -> Tensor:
        """(T, B, outputs), float32 or wider, from memories that start empty."""
        inputs = episodes.inputs.to(self.dtype)
        if self.config.run.autocast == "none":
            logits: Tensor = model(inputs)[0]
            return logits
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = model(inputs)[0]
        return logits.float()

    @torch.inference_mode()
    def accuracy(self, model: nn.Module, sampler: EpisodeSampler, episodes: int) -> Accuracy:
        """Accuracy of ``model`` on at least ``episodes`` episodes from ``sampler``."""
        model.eval()
        counts = []
        for _ in range(math.ceil(episodes / self.config.episodes.batch_size)):
            batch = sampler.sample()
            logits = self.logits(model, batch)
            if batch.targets.dim() == 3:
                logits = logits.unflatten(-1, (LETTERS, LETTERS))
            counts.append(count(logits, batch))
        model.train()
        correct, shown = torch.cat(counts).double().cpu().unbind(1)
        return Accuracy(correct, shown)


def count(logits: Tensor, episodes: Episodes) -> Tensor:
    """Right predictions and showings of each episode by instance, (B, 2, INSTANCES) float32.

    A string label is right when all its letters are. Later showings than INSTANCES are left out.
    """
    right = logits.argmax(-1) == episodes.targets
    if right.dim() == 3:
        right = right.all(-1)
    column = (episodes.instances - 1).clamp_(max=INSTANCES).mT
    counts = torch.zeros(column.shape[0], 2, INSTANCES + 1, device=logits.device)
    counts[:, 0].scatter_add_(1, column, right.mT.float())
    counts[:, 1].scatter_add_(1, column, torch.ones((), device=logits.device).expand_as(column))
    return counts[..., :INSTANCES]


def build_model(config: ModelConfig, input_size: int, output_size: int) -> nn.Module:
    """The model that ``config`` describes."""
    if config.kind == "lstm":
        return models.LSTM(input_size, output_size, config.hidden_size)
    if config.kind == "feedforward":
        return models.FeedForward(input_size, output_size, config.hidden_size)
    return models.MANN(
        input_size,
        output_size,
        config.hidden_size,
        controller=config.controller,
        read_feedback=config.read_feedback,
        num_slots=config.num_slots,
        slot_size=config.slot_size,
        num_reads=config.num_reads,
        usage_decay=config.usage_decay,
        least_used=config.least_used,
        read_strength=config.read_strength,
        learn_strength=config.learn_strength,
        write_content=config.write_content,
        key_activation=config.key_activation,
        gate_bias=config.gate_bias,
    )


def load_data(config: EpisodesConfig, device: torch.device) -> tuple[Any, Any, str]:
    """Training images, held-out images and what they are."""
    try:
        if config.source == "synthetic":
            characters = data.synthetic_characters()
        else:
            characters = data.load_characters(
                config.data_root, allow_synthetic=config.source == "auto"
            )
    except data.DataError as error:
        raise ConfigError(str(error)) from error
    training, test = characters.split()
    return training, test, characters.source


def by_instance(values: Sequence[float]) -> dict[str, float]:
    """Numbers by instance, under the instance's number, without those that are missing."""
    return {str(index + 1): value for index, value in enumerate(values) if not math.isnan(value)}
