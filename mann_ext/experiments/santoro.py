"""One-shot learning with memory-augmented neural networks (Santoro et al. 2016), tables 1 and 2.

Everything a run depends on is here: what can be configured, the presets and their hyper-parameters,
and the paper's numbers to compare with. `few_shot` has the task itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from mann_ext.experiments.config import ConfigError, ExperimentConfig, OptimiserConfig, RunConfig

if TYPE_CHECKING:
    import torch

    from mann_ext.experiments.few_shot import FewShot

INSTANCES = 10
"""Accuracy is reported for the 1st to the 10th time an episode shows a class."""


@dataclass(frozen=True)
class ModelConfig:
    """The network. Fields from num_slots on are of the memory, and unused by the baselines."""

    kind: Literal["mann", "lstm", "feedforward"] = "mann"
    controller: Literal["lstm", "feedforward"] = "lstm"
    """Of the MANN."""
    memory: Literal["lrua", "ntm"] = "lrua"
    """Of the MANN: least recently used access, or the addressing of the Neural Turing Machine, for
    which usage_decay, least_used, learn_strength and write_content mean nothing."""
    hidden_size: int = 200
    read_feedback: bool = False
    """Feed the previous reads to the controller, which then runs step by step."""
    num_slots: int = 128
    slot_size: int = 40
    num_reads: int = 4
    num_writes: int = 1
    """Write heads of the NTM; the LRUA's read heads write too."""
    usage_decay: float = 0.99
    least_used: Literal["per_head", "shared"] = "shared"
    read_strength: float = 10.0
    """Sharpness of reading (1 is the paper's plain softmax), or where a learned one starts."""
    learn_strength: Literal["no", "per_head", "per_step"] = "per_head"
    write_content: bool = False
    """Write a content of its own instead of the key."""
    key_activation: Literal["none", "tanh"] = "tanh"
    gate_bias: float = 0.0
    """First bias of the write gates; positive gates write where was read."""
    advance_bias: float = 0.0
    """How much the NTM's write heads start out moving on by one slot a step."""
    initial_value: float = 1e-6
    """What every episode's memory starts from."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_slots", "slot_size", "num_reads", "num_writes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class EpisodesConfig:
    """The episodes."""

    source: Literal["auto", "omniglot", "synthetic"] = "auto"
    """auto: Omniglot where it is found or can be downloaded, else synthetic glyphs."""
    data_root: Path | None = None
    """Folder of the data; by default MANN_EXT_DATA, then the user's cache folder."""
    synthetic_classes: int = 1623
    """Classes of synthetic glyphs, where it is those."""
    ways: int = 5
    """Classes an episode."""
    length: int | None = None
    """Steps an episode, 10 times the ways by default."""
    labels: Literal["one_hot", "string"] = "one_hot"
    batch_size: int = 16
    """Episodes a minibatch; of each process, where there are several."""
    augment: bool = True
    """Rotate and shift the training images a little, as the paper does."""
    augment_test: bool = False
    """The same for the held-out images. (Quarter turns make other classes, in both.)"""
    grow_every: int = 0
    """A curriculum: one class more, and by default 10 steps, after every so many training episodes
    (of each process)."""
    ways_most: int | None = None
    """Where the curriculum ends; held-out episodes have so many classes from the start."""

    @property
    def test_ways(self) -> int:
        """Classes of a held-out episode."""
        return self.ways if self.ways_most is None else self.ways_most

    def __post_init__(self) -> None:
        if self.grow_every < 0 or (self.grow_every == 0) != (self.ways_most is None):
            raise ConfigError(
                "grow_every, ways_most: expected both for a curriculum, or 0 and None, got "
                f"{self.grow_every} and {self.ways_most}"
            )
        if self.test_ways < self.ways:
            raise ConfigError(
                f"ways_most: expected at least ways, {self.ways}, got {self.ways_most}"
            )
        for name in ("ways", "batch_size", "synthetic_classes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.length is not None and self.length < 1:
            raise ConfigError(f"length: expected at least 1, got {self.length}")


@dataclass(frozen=True)
class SantoroConfig(ExperimentConfig):
    """A run of the paper's classification task."""

    name: ClassVar[str] = "few-shot"
    model: ModelConfig = field(default_factory=ModelConfig)
    episodes: EpisodesConfig = field(default_factory=EpisodesConfig)

    def task(self, device: torch.device, rank: int = 0) -> FewShot:
        from mann_ext.experiments.few_shot import FewShot

        return FewShot(self, device, rank)


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate a trained model on held-out episodes."""

    episodes: int = 3200
    """Least number of episodes."""
    batch_size: int | None = None
    ways: int | None = None
    """Classes an episode; only models of string labels know more than they were trained with. Of
    tasks of support images and queries, change test_ways."""
    test_ways: int | None = None
    """Classes of a task of support images and queries; any number fits a trained model."""
    shots: int | None = None
    """Support images of each class of such a task."""
    queries: int | None = None
    """Queries of each class of such a task."""
    ways_most: int | None = None
    """The same, for models trained with a curriculum."""
    length: int | None = None
    """Steps an episode."""
    num_slots: int | None = None
    """Memory slots; any number fits a trained model."""
    augment_test: bool | None = None
    source: Literal["auto", "omniglot", "synthetic"] | None = None
    data_root: Path | None = None
    seed: int | None = None
    """Seed of the episodes; by default those of the evaluation at the end of the training."""
    threads: int | None = None
    device: str | None = None
    json: Path | None = None
    """Write the results to this file too."""


SlotOrder = Literal["index", "first-write"]


@dataclass(frozen=True)
class InspectOptions:
    """Show what a trained model's memory did in one episode of held-out classes."""

    episode: int = 0
    """Which of the episodes of the evaluation at the end of the training, from 0."""
    out: Path | None = None
    """The page, FILE.html; the figure goes beside it, FILE.png. By default in the run's folder,
    else here."""
    slots: SlotOrder = "index"
    """Order of the slots in the heat maps."""
    num_slots: int | None = None
    """Memory slots; any number fits a trained model."""


# The demo: a MANN that passes the paper's accuracy at the 2nd instance in a few minutes on a CPU.
DEMO = SantoroConfig(
    model=ModelConfig(
        kind="mann",
        controller="lstm",
        hidden_size=200,
        least_used="shared",
        learn_strength="per_head",
        read_strength=10.0,
        key_activation="tanh",
        write_content=True,
        gate_bias=0.0,
    ),
    episodes=EpisodesConfig(ways=5, labels="one_hot", batch_size=16),
    optimiser=OptimiserConfig(
        optimiser="adam", learning_rate=1e-3, schedule="cosine", clip_norm=10.0
    ),
    run=RunConfig(max_minutes=8.0),
)

FIVE_WAY = replace(DEMO, run=RunConfig(minibatches=100_000))
# An episode of 150 images needs room: every image is written to four slots.
FIFTEEN_WAY_STRINGS = replace(
    FIVE_WAY,
    model=replace(FIVE_WAY.model, num_slots=512),
    episodes=replace(FIVE_WAY.episodes, ways=15, labels="string"),
)
# In long episodes from the start the NTM's heads do not learn to write, so 2 classes come first.
FIFTEEN_WAY_STRINGS_NTM = replace(
    FIFTEEN_WAY_STRINGS,
    model=replace(FIFTEEN_WAY_STRINGS.model, memory="ntm", num_slots=128, advance_bias=2.0),
    episodes=replace(FIFTEEN_WAY_STRINGS.episodes, ways=2, grow_every=10_000, ways_most=15),
)
# The paper to the letter: plain cosine softmax, shared least-used slots, its optimiser.
PAPER = replace(
    FIVE_WAY,
    model=ModelConfig(
        least_used="shared", read_strength=1.0, learn_strength="no", key_activation="none"
    ),
    optimiser=OptimiserConfig(
        optimiser="rmsprop",
        learning_rate=1e-4,
        schedule="constant",
        rmsprop_decay=0.95,
        momentum=0.9,
    ),
)


def _with_model(config: SantoroConfig, **changes: object) -> SantoroConfig:
    return replace(config, model=replace(config.model, **changes))  # type: ignore[arg-type]


FIVE_WAY_STRINGS = replace(FIVE_WAY, episodes=EpisodesConfig(ways=5, labels="string"))

PRESETS: dict[str, tuple[SantoroConfig, str]] = {
    "demo": (DEMO, "5-way Omniglot in a few minutes on a CPU"),
    "santoro-5way": (FIVE_WAY, "table 1, MANN: 5 classes, one-hot labels, 100,000 minibatches"),
    "santoro-5way-lstm": (_with_model(FIVE_WAY, kind="lstm"), "table 1, LSTM"),
    "santoro-5way-feedforward": (
        _with_model(FIVE_WAY, kind="feedforward"),
        "table 1, feed-forward network",
    ),
    "santoro-5way-paper": (PAPER, "table 1, MANN with the paper's own reading and optimiser"),
    "santoro-5way-strings": (FIVE_WAY_STRINGS, "table 2, MANN: 5 classes, string labels"),
    "santoro-15way-strings": (FIFTEEN_WAY_STRINGS, "table 2, MANN: 15 classes, string labels"),
    "santoro-15way-strings-feedforward": (
        _with_model(FIFTEEN_WAY_STRINGS, controller="feedforward"),
        "table 2, MANN with a feed-forward controller: 15 classes, string labels",
    ),
    "santoro-15way-strings-ntm": (
        FIFTEEN_WAY_STRINGS_NTM,
        "table 2, MANN with NTM addressing: 2 to 15 classes, string labels",
    ),
    "santoro-15way-strings-lstm": (
        _with_model(FIFTEEN_WAY_STRINGS, kind="lstm"),
        "table 2, LSTM: 15 classes, string labels",
    ),
}

PAPER_INSTANCES = (1, 2, 3, 4, 5, 10)
"""Columns of the paper's tables 1 and 2."""

# (labels, ways) -> who -> accuracy in percent at PAPER_INSTANCES.
PAPER_ACCURACY: dict[tuple[str, int], dict[str, tuple[float, ...]]] = {
    ("one_hot", 5): {
        "human": (34.5, 57.3, 70.1, 71.8, 81.4, 92.4),
        "feed-forward": (24.4, 19.6, 21.1, 19.9, 22.8, 19.5),
        "LSTM": (24.4, 49.5, 55.3, 61.0, 63.6, 62.5),
        "MANN": (36.4, 82.8, 91.0, 92.6, 94.9, 98.1),
    },
    ("string", 5): {
        "kNN, raw pixels": (4.0, 36.7, 41.9, 45.7, 48.1, 57.0),
        "kNN, deep features": (4.0, 51.9, 61.0, 66.3, 69.3, 77.5),
        "feed-forward": (0.0, 0.2, 0.0, 0.2, 0.0, 0.0),
        "LSTM": (0.0, 9.0, 14.2, 16.9, 21.8, 25.5),
        "MANN, feed-forward": (0.0, 8.0, 16.2, 25.2, 30.9, 46.8),
        "MANN": (0.0, 69.5, 80.4, 87.9, 88.4, 93.1),
    },
    ("string", 15): {
        "kNN, raw pixels": (0.5, 18.7, 23.3, 26.5, 29.1, 37.0),
        "kNN, deep features": (0.4, 32.7, 41.2, 47.1, 50.6, 60.0),
        "feed-forward": (0.0, 0.1, 0.0, 0.0, 0.0, 0.0),
        "LSTM": (0.0, 2.2, 2.9, 4.3, 5.6, 12.7),
        "MANN, feed-forward": (0.1, 12.8, 22.3, 28.8, 32.2, 43.4),
        "MANN": (0.1, 62.6, 79.3, 86.6, 88.7, 95.3),
        "MANN (NTM addressing)": (0.0, 35.4, 61.2, 71.7, 77.7, 88.4),
    },
}


def paper_name(model: ModelConfig) -> str:
    """What the paper calls this model in its tables."""
    if model.kind == "mann":
        if model.memory == "ntm":
            return "MANN (NTM addressing)"
        return "MANN" if model.controller == "lstm" else "MANN, feed-forward"
    return "LSTM" if model.kind == "lstm" else "feed-forward"


def paper_rows(config: SantoroConfig) -> dict[str, tuple[float, ...]]:
    """The paper's accuracies in this setting, by model; empty where it reports none."""
    episodes = config.episodes
    return PAPER_ACCURACY.get((episodes.labels, episodes.test_ways), {})
