"""The support/query task: its data, its model, its loss and its accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mann_ext import data, evaluation, models
from mann_ext.data import Tasks, TaskSampler
from mann_ext.experiments.few_shot import TEST_SEED, as_config_error, load_data
from mann_ext.experiments.nearest_neighbours import nearest
from mann_ext.experiments.support_query import (
    LearnerConfig,
    SupportQueryConfig,
    paper_name,
    paper_rows,
)
from mann_ext.models.metric import pair_loss
from mann_ext.reporting import Table

IMAGE_SIZE = 28
MINI_IMAGENET_SIZE = 84
METRIC_NETS = {
    "siamese": models.SiameseNet,
    "matching": models.MatchingNet,
    "prototypical": models.PrototypicalNet,
}
ClassImages = tuple[Tensor, Tensor]
"""Images (M, H, W) or (M, C, H, W) uint8, and their classes (M,)."""


class SupportQuery:
    """The tasks and the computations of one configuration.

    Args:
        config: what to train.
        device: where the images are kept and the tasks are made.
        rank: number of this process; each draws training tasks of its own.

    Attributes:
        data_name: what the tasks are made from.

    Raises:
        ConfigError: an argument of the tasks is out of range.
        DataError: the data is missing or damaged.
    """

    columns = 1
    held_out = "held-out classes"

    def __init__(self, config: SupportQueryConfig, device: torch.device, rank: int = 0) -> None:
        self.config, self.device, self._rank = config, device, rank
        # The output layer of a MetaNet's embedding only makes gradients that are inputs.
        self.unused_parameters = config.model.kind == "metanet"
        self.dtype = torch.float64 if config.run.dtype == "float64" else torch.float32
        if config.episodes.source == "miniimagenet":
            root = config.episodes.data_root
            self._load_training = partial(_mini_imagenet, "train", root)
            self._alphabets: Tensor | None = None
            self._test = test = _mini_imagenet("test", root)
            self.image_size, self.channels = MINI_IMAGENET_SIZE, 3
            self.data_name = f"miniImageNet, {len(test[1].unique())} classes held out"
        else:
            characters = load_data(config.episodes)
            known, new = characters.split(config.episodes.split)
            self._load_training = partial(_turned, known)
            self._test = small(new)
            self._alphabets = _alphabets(known)
            self.image_size, self.channels = IMAGE_SIZE, 1
            self.data_name = (
                f"{characters.source}, {len(known.names):,} classes and their quarter turns to "
                f"train on, {len(new.names):,} held out"
            )

    @cached_property
    def training_episodes(self) -> TaskSampler:
        """Minibatches of tasks of training classes, made at first use: an evaluation needs none."""
        images = self._load_training()
        del self._load_training  # and with it the drawings in full size
        tasks, seed = self.config.episodes, self.config.run.seed
        return self.sampler(
            images, tasks.ways, seed + self._rank, tasks.batch_size, tasks.train_queries,
            group_of=self._alphabets, same_group=tasks.same_alphabet, distort=tasks.distort,
        )  # fmt: skip

    def sampler(
        self,
        images: ClassImages,
        ways: int,
        seed: int,
        batch_size: int = 1,
        queries: int | None = None,
        **options: Any,
    ) -> TaskSampler:
        """Tasks of any images, with the shots of the configuration, and its queries by default."""
        tasks = self.config.episodes
        with as_config_error():
            return TaskSampler(
                *images, ways, tasks.shots, queries or tasks.queries, batch_size, seed,
                self.device, **options,
            )  # fmt: skip

    def model(self) -> nn.Module:
        """A new model, its parameters drawn from torch's random numbers.

        Raises:
            ConfigError: an argument of the model is out of range.
        """
        ways = self.config.episodes.ways
        with as_config_error():
            model = build_model(self.config.model, ways, self.image_size, self.channels)
        return model.to(self.device, self.dtype)

    def loss(self, model: nn.Module, episodes: Tasks) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy of the queries of a minibatch of tasks (for the siamese network of
        pairs, see ``models.metric.pair_loss``), and how many were right and how many there were,
        (2, 1)."""
        entropy = pair_loss if self.config.model.kind == "siamese" else F.cross_entropy
        losses, right = [], []
        for task in zip(*episodes, strict=True):
            *inputs, labels = task
            logits = self.logits(model, *inputs)
            losses.append(entropy(logits, labels))
            right.append((logits.detach().argmax(-1) == labels).sum())
        correct = torch.stack(right).sum()
        tally = torch.stack([correct, torch.full_like(correct, episodes.query_labels.numel())])
        return torch.stack(losses).mean(), tally.unsqueeze(-1)

    def logits(
        self, model: nn.Module, support: Tensor, support_labels: Tensor, queries: Tensor
    ) -> Tensor:
        """Scores of the classes (Q, N) in one task; float32 or wider."""
        autocast = self.config.run.autocast != "none"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            logits: Tensor = model(support.to(self.dtype), support_labels, queries.to(self.dtype))
        return logits.float() if autocast else logits

    def held_out_tasks(
        self, tasks: int, ways: int | None = None, queries: int | None = None
    ) -> Iterator[Tasks]:
        """So many tasks of held-out classes, the same ones at every call.

        Args:
            tasks: how many.
            ways: classes of each; None: as configured.
            queries: of each class; None: as configured.
        """
        ways = self.config.episodes.ways_held_out if ways is None else ways
        return self.tasks_of(self._test, tasks, ways, queries)

    def tasks_of(
        self, images: ClassImages, tasks: int, ways: int, queries: int | None = None
    ) -> Iterator[Tasks]:
        """So many tasks of any images, the same ones at every call."""
        sampler = self.sampler(images, ways, self.config.run.seed + TEST_SEED, queries=queries)
        for _ in range(tasks):
            yield sampler.sample()

    @torch.no_grad()  # not inference mode, in which a MetaNet could not make its gradients
    def accuracies(self, model: nn.Module, batches: Iterable[Tasks]) -> Tensor:
        """The share of right answers in each task, (tasks,) float64."""
        model.eval()
        shares = []
        for batch in batches:
            for *inputs, labels in zip(*batch, strict=True):
                right = self.logits(model, *inputs).argmax(-1) == labels
                shares.append(right.double().mean())
        model.train()
        return torch.stack(shares).cpu()

    def metrics(self, means: Sequence[float]) -> dict[str, Any]:
        """Accuracy by the number of classes a task."""
        return {"accuracy": {str(self.config.episodes.ways): means[0]}}

    def summary(self, metrics: dict[str, Any]) -> str:
        """The accuracy."""
        return "  ".join(f"{n}-way {100 * v:.1f} %" for n, v in metrics["accuracy"].items())

    def evaluate(self, model: nn.Module, episodes: int) -> tuple[int, dict[str, Any]]:
        """How many tasks, and the accuracy with its confidence interval."""
        ways = self.config.episodes.ways_held_out
        shares = self.accuracies(for_ways(model, ways), self.held_out_tasks(episodes, ways))
        return len(shares), summary({str(ways): shares})

    def details(self, model: nn.Module) -> dict[str, Any]:
        """The paper's accuracies in this setting."""
        ways = str(self.config.episodes.ways_held_out)
        known = {
            name: {ways: values[ways] / 100}
            for name, values in paper_rows(self.config.episodes).items()
            if ways in values
        }
        return {"paper": known, "paper_name": paper_name(self.config.model)}

    def table(self, results: dict[str, Any]) -> Table:
        """The accuracy beside the paper's."""
        tasks = self.config.episodes
        ways = str(tasks.ways_held_out)
        title = (
            f"{ways} classes, {tasks.shots} shot{'s' * (tasks.shots > 1)}: {results['paper_name']} "
            f"after {results['minibatches']:,} minibatches, {results['episodes']:,} tasks of "
            f"held-out classes\n{results['data']}"
        )
        width = results["half_width_95"].get(ways)
        rows = [("this run", f"{100 * results['accuracy'][ways]:.2f}")]
        if width is not None:
            rows.append(("  95 % interval", f"±{100 * width:.2f}"))
        for name, values in results["paper"].items():
            rows.append((f"paper, {name}", f"{100 * values[ways]:.2f}"))
        return Table(title, ("", "accuracy (%)"), tuple(rows))

    def draw(self, run_dir: Path) -> None:
        """Draw ``accuracy.png``."""
        from mann_ext import figures

        figures.draw_tasks(run_dir)


class PixelNeighbours(nn.Module):
    """The class of the nearest support image by its pixels (Euclidean), as logits of 0 and 1."""

    def forward(self, support: Tensor, support_labels: Tensor, queries: Tensor) -> Tensor:
        """support (S, C, H, W), support_labels (S,), queries (Q, C, H, W) -> (Q, ways)."""
        points, asked = (images.flatten(1).cpu().numpy() for images in (support, queries))
        found = torch.from_numpy(nearest(points, support_labels.cpu().numpy(), asked))
        one_hot = F.one_hot(found, int(support_labels.max()) + 1)
        return one_hot.to(queries.device, queries.dtype)


def build_model(config: LearnerConfig, ways: int, image_size: int, channels: int) -> nn.Module:
    """The model that ``config`` describes."""
    if config.kind == "neighbours":
        return PixelNeighbours()
    if config.kind == "metanet":
        return models.MetaNet(
            ways, config.variant, config.filters, image_size, config.second_order,
            channels=channels, task_examples=config.task_examples,
            read_strength=config.read_strength,
        )  # fmt: skip
    return METRIC_NETS[config.kind](config.filters, image_size, channels=channels)


def for_ways(model: nn.Module, ways: int) -> nn.Module:
    """The model for tasks of so many classes; only a MetaNet has a layer that depends on it."""
    if isinstance(model, models.MetaNet) and model.ways != ways:
        return model.with_ways(ways)
    return model


def summary(shares: dict[str, Tensor]) -> dict[str, Any]:
    """Accuracies and halves of their 95 % confidence intervals, from Student's t distribution with
    the task as the sampling unit, ready for JSON.

    Args:
        shares: of right answers in each task, (tasks,), under names.
    """
    widths = {
        name: evaluation.t_quantile(len(values) - 1) * values.std().item() / math.sqrt(len(values))
        for name, values in shares.items()
        if len(values) > 1
    }
    return {
        "accuracy": {name: values.mean().item() for name, values in shares.items()},
        "half_width_95": widths,
    }


def small(characters: data.Characters) -> ClassImages:
    """Drawings of 28 x 28 pixels and their classes."""
    count, drawings = characters.images.shape[:2]
    images = data.shrink(characters.images.flatten(0, 1), IMAGE_SIZE)
    return images, torch.arange(count).repeat_interleave(drawings)


def _turned(characters: data.Characters) -> ClassImages:
    """The same, and turned by quarter turns."""
    return data.quarter_turns(*small(characters))


def _alphabets(characters: data.Characters) -> Tensor:
    """The alphabet of each of the images that `_turned` makes; turned, it is another one."""
    drawings = characters.images.shape[1]
    names = [name.rpartition("/")[0] for name in characters.names]
    number = {name: place for place, name in enumerate(sorted(set(names)))}
    alphabet = torch.tensor([number[name] for name in names]).repeat_interleave(drawings)
    return torch.cat([alphabet + turns * len(number) for turns in range(4)])


def _mini_imagenet(part: Any, root: Path | None) -> ClassImages:
    found = data.mini_imagenet(part, root, size=MINI_IMAGENET_SIZE)
    return found.images, found.class_of
