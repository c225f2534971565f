"""What every experiment can be configured with, as frozen dataclasses that are written as JSON.

Importing this module imports neither torch nor numpy, so that the command line answers at once.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    import torch

    from mann_ext.experiments.task import Task

ConfigT = TypeVar("ConfigT")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says what to change."""


@dataclass(frozen=True)
class OptimiserConfig:
    """The optimiser and its learning-rate schedule."""

    optimiser: Literal["adam", "rmsprop"] = "adam"
    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate falls over the run's budget (minibatches or minutes)."""
    final_learning_rate: float = 0.01
    """Learning rate at the end of a cosine or linear schedule, as a fraction of the highest."""
    warmup: int = 0
    """Minibatches over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """Decoupled from the gradient for adam, added to it for rmsprop."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    rmsprop_decay: float = 0.95
    momentum: float = 0.9
    """Of rmsprop."""
    clip_norm: float = 10.0
    """Largest norm of the whole gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        _at_least("learning_rate", self.learning_rate, 0.0)
        _within("final_learning_rate", self.final_learning_rate, 0.0, 1.0)
        _at_least("warmup", self.warmup, 0)
        _at_least("weight_decay", self.weight_decay, 0.0)
        _within("momentum", self.momentum, 0.0, 1.0)
        _within("rmsprop_decay", self.rmsprop_decay, 0.0, 1.0)
        _at_least("clip_norm", self.clip_norm, 0.0)


@dataclass(frozen=True)
class RunConfig:
    """How long a run lasts, where it runs, and what it writes."""

    minibatches: int | None = None
    """Stop after this many minibatches. Such a run is resumed bit for bit on the CPU."""
    max_minutes: float | None = None
    """Stop after this many minutes of training, evaluations on the way included."""
    log_every: int = 50
    """Minibatches between two lines of metrics; the only times the device is waited for."""
    eval_every: int = 1000
    """Minibatches between two held-out evaluations; 0 evaluates only at the end."""
    eval_episodes: int = 320
    final_episodes: int = 3200
    """Episodes of the evaluation at the end of the run; 0 leaves it out."""
    checkpoint_every: int = 1000
    """Minibatches between two checkpoints; one is also written at the end and on Ctrl-C."""
    keep_checkpoints: int = 2
    seed: int = 0
    threads: int = 0
    """CPU threads; 0 tries a few numbers at the start and takes the quickest."""
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    autocast: Literal["none", "bfloat16"] = "none"
    compile: bool = False
    """Compile the model with torch.compile."""
    tensorboard: bool = True
    """Write TensorBoard logs, if it is installed."""
    figure: bool = True
    """Draw the run's figure at the end, if matplotlib is installed."""
    run_dir: Path | None = None
    """Folder of the run. Default: runs/PRESET-DATE-TIME, so nothing is overwritten."""

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "eval_episodes"):
            _at_least(name, getattr(self, name), 1)
        for name in ("eval_every", "final_episodes", "threads", "seed"):
            _at_least(name, getattr(self, name), 0)
        if self.minibatches is not None:
            _at_least("minibatches", self.minibatches, 0)
        if self.max_minutes is not None:
            _at_least("max_minutes", self.max_minutes, 0.0)
        if self.minibatches is None and self.max_minutes is None:
            raise ConfigError("minibatches, max_minutes: expected at least one limit, got neither")


@dataclass(frozen=True)
class ExperimentConfig:
    """A run of an experiment; each experiment has a subclass, with a model and episodes of its own.

    Attributes:
        name: of the experiment, kept in its runs' files.
    """

    name: ClassVar[str]
    model: Any
    episodes: Any
    """Has at least a batch_size."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(minibatches=100_000))

    def task(self, device: torch.device, rank: int = 0) -> Task:
        """The task, for the process of this rank; only now is what it needs imported."""
        raise NotImplementedError


# Fields that may differ when a run is resumed: they change how long it runs, where, and what it
# reports, but not what a minibatch computes.
RESUME_MAY_CHANGE = frozenset(
    field.name
    for field in dataclasses.fields(RunConfig)
    if field.name not in ("seed", "dtype", "autocast", "compile")
) | {"data_root"}


def _at_least(name: str, value: float, lowest: float) -> None:
    if not value >= lowest:
        raise ConfigError(f"{name}: expected at least {lowest}, got {value}")


def _within(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise ConfigError(f"{name}: expected {lowest} to {highest}, got {value}")


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries that ``json`` can write."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def from_json(config_class: type[ConfigT], values: Any, where: str = "config") -> ConfigT:
    """The configuration that `to_json` wrote.

    Raises:
        ConfigError: a field is unknown, missing or of another type; the message names it.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {values!r}")
    hints = typing.get_type_hints(config_class)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(hints)}")
    arguments = {
        name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()
    }
    try:
        return config_class(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, where)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in options:
            return value
    elif origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        present = [option for option in options if option is not type(None)]
        return _convert(present[0], value, where)
    elif origin is tuple:
        if isinstance(value, list) and len(value) == len(options):
            return tuple(
                _convert(kind, item, where) for kind, item in zip(options, value, strict=True)
            )
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def differences(first: Any, second: Any) -> list[str]:
    """Fields in which two configurations differ, as ``name: FIRST, now SECOND``."""
    found = []
    for item in dataclasses.fields(first):
        old, new = getattr(first, item.name), getattr(second, item.name, None)
        if dataclasses.is_dataclass(old):
            found += differences(old, new)
        elif old != new and item.name not in RESUME_MAY_CHANGE:
            found.append(f"{item.name}: {old}, now {new}")
    return found
