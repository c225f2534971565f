"""The few-shot classification task: its data, its model, its loss and its accuracies."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mann_ext import data, models
from mann_ext.data import Characters, Episodes, EpisodeSampler
from mann_ext.experiments.config import ConfigError
from mann_ext.experiments.santoro import INSTANCES, EpisodesConfig, ModelConfig, SantoroConfig

LETTERS = 5
"""A string label has five letters, each one of five."""
TEST_SEED = 1_000_003
"""Added to the run's seed for the held-out episodes, so that no process trains with it."""


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
    """The episodes and the computations of one configuration.

    Args:
        config: what to train.
        device: where the images are kept and the episodes are made.
        rank: number of this process; each draws training episodes of its own.

    Attributes:
        data_name: what the episodes are made from.

    Raises:
        ConfigError: an argument of the episodes is out of range.
        DataError: the data is missing or damaged.
    """

    def __init__(self, config: SantoroConfig, device: torch.device, rank: int = 0) -> None:
        self.config = config
        self.device = device
        self.dtype = torch.float64 if config.run.dtype == "float64" else torch.float32
        episodes, seed = config.episodes, config.run.seed
        characters = load_data(episodes)
        known, new = characters.split()
        self.data_name = (
            f"{characters.source}, {len(known.names):,} classes to train on and "
            f"{len(new.names):,} held out"
        )
        self._make_training = partial(self._sampler, known, episodes.augment, seed + rank)
        self._test_episodes = self._sampler(new, episodes.augment_test, seed + TEST_SEED)
        self._test_start = self._test_episodes.state_dict()

    @cached_property
    def training_episodes(self) -> EpisodeSampler:
        """Minibatches of training classes, made at first use: an evaluation needs none."""
        sampler = self._make_training()
        del self._make_training  # and with it the drawings in full size
        return sampler

    def _sampler(self, characters: Characters, augment: bool, seed: int) -> EpisodeSampler:
        episodes = self.config.episodes
        with _as_config_error():
            return EpisodeSampler(
                characters,
                ways=episodes.ways,
                length=episodes.length,
                batch_size=episodes.batch_size,
                labels=episodes.labels,
                augment=augment,
                seed=seed,
                device=self.device,
            )

    def model(self) -> nn.Module:
        """A new model, its parameters drawn from torch's random numbers.

        Raises:
            ConfigError: an argument of the model is out of range.
        """
        episodes = self._test_episodes
        with _as_config_error():
            model = build_model(self.config.model, episodes.input_size, episodes.label_size)
        return model.to(self.device, self.dtype)

    def loss(self, model: nn.Module, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy of a minibatch, summed over the letters of a string label, and
        its right predictions and showings by instance, (2, INSTANCES)."""
        logits = self.logits(model, episodes)
        targets = episodes.targets
        entropies = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
        tally = count(logits.detach(), episodes).sum(0)
        return entropies / episodes.instances.numel(), tally

    def logits(self, model: nn.Module, episodes: Episodes) -> Tensor:
        """Scores of the labels (T, B, N), or of the letters (T, B, 5, 5), from an empty memory;
        float32 or wider."""
        inputs = episodes.inputs.to(self.dtype)
        autocast = self.config.run.autocast != "none"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            logits: Tensor = model(inputs)[0]
        logits = logits.float() if autocast else logits
        return logits.unflatten(-1, (LETTERS, -1)) if episodes.targets.dim() == 3 else logits

    @torch.inference_mode()
    def held_out_accuracy(self, model: nn.Module, episodes: int) -> Accuracy:
        """Accuracy on at least ``episodes`` episodes of held-out classes, the same ones at every
        call."""
        model.eval()
        self._test_episodes.load_state_dict(self._test_start)
        counts = []
        for _ in range(math.ceil(episodes / self.config.episodes.batch_size)):
            batch = self._test_episodes.sample()
            counts.append(count(self.logits(model, batch), batch))
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
    options: dict[str, Any] = {
        "num_slots": config.num_slots,
        "slot_size": config.slot_size,
        "num_reads": config.num_reads,
        "read_strength": config.read_strength,
        "key_activation": config.key_activation,
        "gate_bias": config.gate_bias,
        "initial_value": config.initial_value,
    }
    if config.memory == "ntm":
        options["num_writes"] = config.num_writes
    else:
        options["usage_decay"] = config.usage_decay
        options["least_used"] = config.least_used
        options["learn_strength"] = config.learn_strength
        options["write_content"] = config.write_content
    return models.MANN(
        input_size,
        output_size,
        config.hidden_size,
        controller=config.controller,
        addressing=config.memory,
        read_feedback=config.read_feedback,
        **options,
    )


def load_data(config: EpisodesConfig) -> Characters:
    """The characters that episodes are made from."""
    if config.source == "synthetic":
        return data.synthetic_characters(config.synthetic_classes)
    return data.load_characters(config.data_root, allow_synthetic=config.source == "auto")


@contextlib.contextmanager
def _as_config_error() -> Iterator[None]:
    """Arguments that a constructor refuses came from the configuration."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from None


def by_instance(values: Sequence[float]) -> dict[str, float]:
    """Numbers by instance, under the instance's number, without those that are missing."""
    return {str(index + 1): value for index, value in enumerate(values) if not math.isnan(value)}
