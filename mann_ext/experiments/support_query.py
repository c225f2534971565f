"""Meta Networks (Munkhdalai & Yu 2017) and what they are compared with: tasks of a few labelled
images and queries, one after the other.

What can be configured, the presets, and the paper's numbers. `support_query_task` has the task
itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from mann_ext.experiments.config import ConfigError, ExperimentConfig, OptimiserConfig, RunConfig

if TYPE_CHECKING:
    import torch

    from mann_ext.experiments.support_query_task import SupportQuery

Kind = Literal["metanet", "siamese", "matching", "prototypical", "neighbours"]
Variant = Literal["metanet", "minus", "plus"]


@dataclass(frozen=True)
class LearnerConfig:
    """What learns from the support images of a task."""

    kind: Kind = "metanet"
    """neighbours: the nearest support image by its pixels, which needs no training."""
    variant: Variant = "metanet"
    """Of the MetaNet: minus has no task-level fast weights, plus has them in the base learner
    too."""
    filters: int = 64
    """Of each convolution."""
    read_strength: float = 30.0
    """MetaNet: of reading fast weights; 1 in the paper."""
    task_examples: int | None = None
    """MetaNet: of how many support images task-level fast weights are made; by default of all."""
    second_order: bool = False
    """MetaNet: differentiate through the gradients that make its fast weights."""

    def __post_init__(self) -> None:
        if self.filters < 1:
            raise ConfigError(f"filters: expected at least 1, got {self.filters}")
        if self.task_examples is not None and self.task_examples < 1:
            raise ConfigError(f"task_examples: expected at least 1, got {self.task_examples}")
        if not self.read_strength > 0:
            raise ConfigError(f"read_strength: expected more than 0, got {self.read_strength}")


@dataclass(frozen=True)
class TasksConfig:
    """The tasks."""

    source: Literal["auto", "omniglot", "synthetic", "miniimagenet"] = "auto"
    """auto: Omniglot where it is found or can be downloaded, else synthetic glyphs."""
    data_root: Path | None = None
    """Folder of the data; by default MANN_EXT_DATA, then the user's cache folder."""
    synthetic_classes: int = 1623
    """Classes of synthetic glyphs, where it is those."""
    split: Literal["santoro", "background"] = "santoro"
    """1,200 random characters to train on, or Omniglot's background set. (Each character turned by
    90, 180 and 270 degrees is three more classes to train on.)"""
    ways: int = 5
    """Classes of a training task."""
    test_ways: int | None = None
    """Classes of a held-out task; by default as many."""
    shots: int = 1
    """Support images of each class."""
    queries: int = 10
    """Queries of each class."""
    train_queries: int | None = None
    """Queries of each class in a training task; by default as many."""
    batch_size: int = 1
    """Tasks a minibatch; of each process, where there are several."""
    same_alphabet: float = 0.0
    """Share of training tasks whose classes are all of one alphabet (turned the same way)."""
    distort: bool = False
    """Turn, shear, stretch and shift every second image of the training tasks a little."""

    @property
    def ways_held_out(self) -> int:
        """Classes of a held-out task."""
        return self.ways if self.test_ways is None else self.test_ways

    def __post_init__(self) -> None:
        for name in ("ways", "shots", "queries", "batch_size", "synthetic_classes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("test_ways", "train_queries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        if not 0 <= self.same_alphabet <= 1:
            raise ConfigError(f"same_alphabet: expected 0 to 1, got {self.same_alphabet}")
        if self.same_alphabet and self.source == "miniimagenet":
            raise ConfigError("same_alphabet: miniImageNet has no alphabets; leave it at 0")


@dataclass(frozen=True)
class SupportQueryConfig(ExperimentConfig):
    """A run of support/query classification."""

    name: ClassVar[str] = "support-query"
    model: LearnerConfig = field(default_factory=LearnerConfig)
    episodes: TasksConfig = field(default_factory=TasksConfig)

    def task(self, device: torch.device, rank: int = 0) -> SupportQuery:
        from mann_ext.experiments.support_query_task import SupportQuery

        return SupportQuery(self, device, rank)


RUN = RunConfig(
    minibatches=20_000, log_every=100, eval_every=2000, eval_episodes=100, final_episodes=1000
)

FIVE_WAY = SupportQueryConfig(optimiser=OptimiserConfig(), run=RUN)
"""The paper's: Adam at 1e-3 (here falling by a cosine), the gradient's norm clipped at 10, one task
an update, 10 queries a class."""


def with_model(config: SupportQueryConfig, kind: Kind, variant: Variant) -> SupportQueryConfig:
    """The same tasks and budget for another learner."""
    return replace(config, model=replace(config.model, kind=kind, variant=variant))


def with_ways(config: SupportQueryConfig, ways: int) -> SupportQueryConfig:
    """The same on tasks of so many classes.

    In training with 5 queries a class, and with task-level fast weights of two examples: an update
    takes half the time or less, and as many of them teach as much.
    """
    return replace(
        config,
        model=replace(config.model, task_examples=2),
        episodes=replace(config.episodes, ways=ways, train_queries=5),
    )


MINI_IMAGENET = replace(FIVE_WAY, episodes=TasksConfig(source="miniimagenet", queries=15))
STANDARD = replace(
    FIVE_WAY, episodes=TasksConfig(split="background", same_alphabet=0.5, distort=True)
)
DISTORTED = replace(FIVE_WAY, episodes=TasksConfig(distort=True))

WAYS = (5, 10, 15, 20)
"""Classes of a task in the paper's tables."""

LEARNERS: dict[str, tuple[str, Kind, Variant]] = {
    "metanet-minus": ("MetaNet-", "metanet", "minus"),
    "metanet": ("MetaNet", "metanet", "metanet"),
    "metanet-plus": ("MetaNet+", "metanet", "plus"),
    "siamese": ("siamese network", "siamese", "metanet"),
    "matching": ("matching network", "matching", "metanet"),
    "protonet": ("prototypical network", "prototypical", "metanet"),
    "knn": ("pixel kNN", "neighbours", "metanet"),
}
"""What tables call each learner, and how it is configured."""

PRESETS: dict[str, tuple[SupportQueryConfig, str]] = {
    **{
        f"metanet{kind}-{ways}way": (
            with_ways(base, ways),
            f"MetaNet: 1 shot, {ways} classes{what}",
        )
        for kind, base, what in (
            ("", FIVE_WAY, ""),
            ("-standard", STANDARD, ", background and evaluation set"),
            ("-distorted", DISTORTED, ", half of the training images distorted"),
        )
        for ways in WAYS
    },
    "metanet-miniimagenet": (
        with_ways(MINI_IMAGENET, 5),
        "MetaNet: 1 shot, 5 classes of miniImageNet",
    ),
    **{
        f"{name}-{ways}way": (
            with_model(with_ways(FIVE_WAY, ways), LEARNERS[name][1], "metanet"),
            f"{LEARNERS[name][0]}: 1 shot, {ways} classes",
        )
        for name in ("protonet", "matching", "siamese")
        for ways in (5, 20)
    },
}


def paper_name(model: LearnerConfig) -> str:
    """What tables call this learner."""
    kind, variant = model.kind, model.variant
    if kind != "metanet":
        variant = "metanet"
    return next(label for label, *own in LEARNERS.values() if own == [kind, variant])


# (split or source) -> who -> ways -> accuracy in percent, one shot; absent where it is not known.
PAPER_ACCURACY: dict[str, dict[str, dict[str, float]]] = {
    "santoro": {
        "pixel kNN": {"5": 41.7, "20": 26.7},
        "MetaNet-": {"5": 98.4, "10": 98.32, "15": 96.68, "20": 96.13},
        "MetaNet": {"5": 98.95, "10": 98.67, "15": 97.11, "20": 97.0},
        "MetaNet+": {"5": 98.45, "10": 97.05, "15": 96.48, "20": 95.08},
    },
    "background": {
        "human": {"20": 95.5},
        "pixel kNN": {"20": 21.7},
        "siamese network": {"20": 92.0},
        "hierarchical Bayesian program learning": {"20": 96.7},
        "MetaNet": {"5": 98.45, "10": 97.32, "15": 96.4, "20": 95.92},
    },
    "miniimagenet": {"MetaNet": {"5": 49.21}},
}


def paper_rows(tasks: TasksConfig) -> dict[str, dict[str, float]]:
    """The paper's accuracies in this setting, by learner; empty where it reports none."""
    if tasks.shots != 1:
        return {}
    key = "miniimagenet" if tasks.source == "miniimagenet" else tasks.split
    return PAPER_ACCURACY[key]
