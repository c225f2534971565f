"""The few-shot classification task: its data, its model, its loss and its accuracies."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mann_ext import data, models
from mann_ext.data import Characters, Episodes, EpisodeSampler
from mann_ext.experiments.config import ConfigError
from mann_ext.experiments.santoro import (
    INSTANCES,
    PAPER_INSTANCES,
    EpisodesConfig,
    ModelConfig,
    SantoroConfig,
    paper_name,
    paper_rows,
)
from mann_ext.experiments.support_query import TasksConfig
from mann_ext.memory import LRUAMemoryTrace
from mann_ext.reporting import Table, ordinal

SHOWN_INSTANCES = (1, 2, 5, 10)
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

    def summary(self) -> dict[str, Any]:
        """All of it for JSON: accuracy and half_width_95 by instance, and episodes."""
        return {
            "accuracy": by_instance(self.means()),
            "half_width_95": by_instance(self.half_widths()),
            "episodes": self.episodes,
        }


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

    columns = INSTANCES
    held_out = "held-out classes"
    unused_parameters = False

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
        self._make_training = partial(
            self._sampler, known, seed + rank,
            ways=episodes.ways, augment=episodes.augment,
            grow_every=episodes.grow_every, ways_most=episodes.ways_most,
        )  # fmt: skip
        self._test_episodes = self._sampler(
            new, seed + TEST_SEED, ways=episodes.test_ways, augment=episodes.augment_test
        )
        self._test_start = self._test_episodes.state_dict()

    @cached_property
    def training_episodes(self) -> EpisodeSampler:
        """Minibatches of training classes, made at first use: an evaluation needs none."""
        sampler = self._make_training()
        del self._make_training  # and with it the drawings in full size
        return sampler

    def _sampler(self, characters: Characters, seed: int, **options: Any) -> EpisodeSampler:
        episodes = self.config.episodes
        with as_config_error():
            return EpisodeSampler(
                characters,
                length=episodes.length,
                batch_size=episodes.batch_size,
                labels=episodes.labels,
                seed=seed,
                device=self.device,
                **options,
            )

    def model(self) -> nn.Module:
        """A new model, its parameters drawn from torch's random numbers.

        Raises:
            ConfigError: an argument of the model is out of range.
        """
        episodes = self._test_episodes
        with as_config_error():
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
        return self._run(model, episodes)[0]

    def trace(self, model: models.MANN, episodes: Episodes) -> tuple[Tensor, LRUAMemoryTrace]:
        """`logits`, and what the memory did at every step."""
        logits, _, trace = self._run(model, episodes, return_trace=True)
        return logits, trace

    def _run(self, model: nn.Module, episodes: Episodes, **options: bool) -> tuple[Any, ...]:
        inputs = episodes.inputs.to(self.dtype)
        autocast = self.config.run.autocast != "none"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            logits, *others = model(inputs, **options)
        logits = logits.float() if autocast else logits
        if episodes.targets.dim() == 3:
            logits = logits.unflatten(-1, (LETTERS, -1))
        return logits, *others

    @property
    def held_out_count(self) -> int:
        """How many episodes the evaluation after the training counts; a minibatch at least."""
        batch = self.config.episodes.batch_size
        return max(1, math.ceil(self.config.run.final_episodes / batch)) * batch

    def held_out_episode(self, index: int) -> Episodes:
        """Episode ``index``, from 0, of those that `held_out_accuracy` counts: a batch of one."""
        skipped, column = divmod(index, self.config.episodes.batch_size)
        self._test_episodes.load_state_dict(self._test_start)
        for _ in range(skipped):
            self._test_episodes.sample()
        return Episodes(*(part[:, column, None] for part in self._test_episodes.sample()))

    @torch.inference_mode()
    def held_out_accuracy(self, model: nn.Module, episodes: int) -> Accuracy:
        """Accuracy on at least ``episodes`` episodes of held-out classes, the same ones at every
        call."""
        model.eval()
        batches = self.held_out_episodes(episodes)
        counts = [count(self.logits(model, batch), batch) for batch in batches]
        model.train()
        return accuracy(counts)

    def held_out_episodes(self, episodes: int) -> Iterator[Episodes]:
        """Minibatches of at least ``episodes`` episodes of held-out classes, the same at every
        call."""
        self._test_episodes.load_state_dict(self._test_start)
        for _ in range(math.ceil(episodes / self.config.episodes.batch_size)):
            yield self._test_episodes.sample()

    def metrics(self, means: Sequence[float]) -> dict[str, Any]:
        """Accuracy by instance."""
        return {"accuracy": by_instance(means)}

    def summary(self, metrics: dict[str, Any]) -> str:
        """The accuracies to watch."""
        return accuracies(metrics["accuracy"])

    def evaluate(self, model: nn.Module, episodes: int) -> tuple[int, dict[str, Any]]:
        """How many episodes, and `held_out_accuracy` with its confidence intervals."""
        accuracy = self.held_out_accuracy(model, episodes)
        widths = {"half_width_95": by_instance(accuracy.half_widths())}
        return accuracy.episodes, {**self.metrics(accuracy.means()), **widths}

    def details(self, model: nn.Module) -> dict[str, Any]:
        """The paper's accuracies in this setting."""
        return {
            "paper": {
                name: dict(
                    zip(map(str, PAPER_INSTANCES), (value / 100 for value in values), strict=True)
                )
                for name, values in paper_rows(self.config).items()
            },
            "paper_name": paper_name(self.config.model),
        }

    def table(self, results: dict[str, Any]) -> Table:
        """The accuracies by instance beside the paper's."""
        episodes, own = self.config.episodes, results["paper_name"]
        title = (
            f"Accuracy (%) by instance, {results['episodes']:,} episodes of held-out classes, "
            f"{own} after {results['minibatches']:,} minibatches\n"
            f"{episodes.test_ways} classes an episode, {episodes.labels.replace('_', '-')} labels, "
            f"{results['data']}"
        )
        paper = {name: row for name, row in results["paper"].items() if name == own}
        paper |= {name: row for name, row in results["paper"].items() if name != own}
        shares = {"this run": results["accuracy"]}
        shares |= {f"paper, {name}": row for name, row in paper.items()}
        rows = {name: {k: f"{100 * v:.1f}" for k, v in row.items()} for name, row in shares.items()}
        widths = {k: f"±{100 * v:.1f}" for k, v in results["half_width_95"].items()}
        rows = {"this run": rows.pop("this run"), "  95 % interval": widths, **rows}
        numbers = range(1, INSTANCES + 1)
        return Table(
            title,
            ("", *map(ordinal, numbers)),
            tuple(
                (name, *(row.get(str(number), "") for number in numbers))
                for name, row in rows.items()
            ),
            narrow=(0, *PAPER_INSTANCES),
        )

    def draw(self, run_dir: Path) -> None:
        """Draw ``accuracy.png``."""
        from mann_ext import figures

        figures.draw_run(run_dir)


def count(logits: Tensor, episodes: Episodes) -> Tensor:
    """Right predictions and showings of each episode by instance, (B, 2, INSTANCES) float32.

    A string label is right when all its letters are. Later showings than INSTANCES are left out.
    """
    right = logits.argmax(-1) == episodes.targets
    return count_right(right.all(-1) if right.dim() == 3 else right, episodes.instances)


def count_right(right: Tensor, instances: Tensor) -> Tensor:
    """The same from whether each prediction was right, (T, B) bool, and instances (T, B)."""
    column = (instances - 1).clamp_(max=INSTANCES).mT
    counts = torch.zeros(column.shape[0], 2, INSTANCES + 1, device=right.device)
    counts[:, 0].scatter_add_(1, column, right.mT.float())
    counts[:, 1].scatter_add_(1, column, torch.ones((), device=right.device).expand_as(column))
    return counts[..., :INSTANCES]


def accuracy(counts: Sequence[Tensor]) -> Accuracy:
    """Of several minibatches, as `count` gives them."""
    correct, shown = torch.cat(list(counts)).double().cpu().unbind(1)
    return Accuracy(correct, shown)


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
        options["advance_bias"] = config.advance_bias
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


def load_data(config: EpisodesConfig | TasksConfig) -> Characters:
    """The characters that episodes are made from."""
    if config.source == "synthetic":
        return data.synthetic_characters(config.synthetic_classes)
    return data.load_characters(config.data_root, allow_synthetic=config.source == "auto")


@contextlib.contextmanager
def as_config_error() -> Iterator[None]:
    """Arguments that a constructor refuses came from the configuration."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from None


def by_instance(values: Sequence[float]) -> dict[str, float]:
    """Numbers by instance, under the instance's number, without those that are missing."""
    return {str(index + 1): value for index, value in enumerate(values) if not math.isnan(value)}


def accuracies(by_instance: Mapping[str, float]) -> str:
    """The accuracies to watch, such as ``1st 35.1  2nd 82.9  5th 95.0  10th 97.3 %``."""
    parts = [
        f"{ordinal(number)} {100 * by_instance[str(number)]:.1f}"
        for number in SHOWN_INSTANCES
        if str(number) in by_instance
    ]
    return "  ".join(parts) + " %"
