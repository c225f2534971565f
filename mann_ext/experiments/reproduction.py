"""What it takes to reproduce a published result: its runs, and how they are measured and shown.

Importing this module imports neither torch nor numpy, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from mann_ext.experiments.config import ConfigError
from mann_ext.reporting import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Sequence[dict[str, Any]]]
"""What was measured of each run, by its name, one entry a seed."""


@dataclass(frozen=True)
class Run:
    """A row of a table: a model that is trained and measured, or a method that is only measured."""

    name: str
    """Of its files, and for --only."""
    label: str
    """What tables and figures call it, the paper's name where it has one."""
    config: Any
    """A frozen dataclass with a ``run`` (RunConfig), whose seed and budget the options change."""
    preset: str | None
    """The preset whose variant this is, for ``mann-ext train``; None: nothing is trained first."""
    minutes: float
    """About how long it takes on two cores with its own budget."""


@dataclass(frozen=True)
class Reproduction:
    """A published result, or a question of our own."""

    name: str
    description: str
    """One line."""
    paper: str
    """What the paper reports, for the page of results."""
    runs: tuple[Run, ...]
    module: str
    """Where its `Experiment` is; imported when needed, because it may import torch."""
    seeds: tuple[int, ...] = (0,)
    """Trained by default."""
    findings: str = ""
    """What the kept results say, in words, for the page."""

    def experiment(self) -> Experiment:
        """How the runs are measured and shown."""
        return cast(Experiment, importlib.import_module(self.module))

    def chosen(self, names: Sequence[str]) -> tuple[Run, ...]:
        """The runs of these names, or all of them for none.

        Raises:
            ConfigError: there is no run of a name.
        """
        known = {run.name: run for run in self.runs}
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"only: {self.name} has no row {name!r}; expected some of {', '.join(known)}"
                )
        return tuple(known[name] for name in names) if names else self.runs


class Experiment(Protocol):
    """What the module of a `Reproduction` has, as functions."""

    def measure(self, run: Run, config: Any, trained: Path | None, episodes: int) -> dict[str, Any]:
        """What is written as JSON: at least ``config`` and ``episodes``, see
        ``evaluation.provenance``.

        Args:
            run: which.
            config: ``run.config`` with the seed, the budget and the data that were asked for.
            trained: folder of the trained model, or None where ``run.preset`` is.
            episodes: least number to measure on.
        """

    def tables(self, reproduction: Reproduction, results: Results) -> list[Table]:
        """Ours beside the paper's; runs may be missing from ``results``."""

    def figures(self, reproduction: Reproduction, results: Results) -> dict[str, Figure]:
        """The same as pictures, by name; "" is the only or the first one."""


@dataclass(frozen=True)
class ReproduceOptions:
    """Train what is missing, measure it on held-out data, and show it beside the paper's.

    What is in the folder already, of the same configuration, is not trained or measured again.
    """

    minutes: float | None = None
    """Training budget of each model, in minutes, instead of the row's own."""
    minibatches: int | None = None
    """The same in minibatches; with both, whichever is spent first."""
    seeds: tuple[int, ...] | None = None
    """Train and measure each row once for each of them."""
    only: tuple[str, ...] = ()
    """Rows to train and measure; by default all."""
    episodes: int = 1000
    """Least number of held-out episodes."""
    threads: int | None = None
    """CPU threads."""
    out: Path | None = None
    """Folder of the results and of the training runs. Default: runs/reproduce/NAME, or NAME-kept
    with --from-results."""
    runs: Path | None = None
    """Folder of the training runs alone; reproductions that measure the same models differently,
    as those of MetaNet do, share them there."""
    page: Path | None = None
    """Also write the page of tables to this Markdown file, and the figures beside it."""
    from_results: bool = False
    """Show the committed results instead, without training or measuring."""
    source: Literal["omniglot", "synthetic"] = "omniglot"
    """Characters to train and to measure on, where the row has those; only Omniglot compares with
    the paper."""
    data_root: Path | None = None
    """Folder of the data; by default MANN_EXT_DATA, then the user's cache folder."""

    def __post_init__(self) -> None:
        for name in ("minutes", "minibatches"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name}: expected at least 0, got {value}")
        if self.episodes < 2:
            raise ConfigError(
                f"episodes: expected at least 2, for an interval, got {self.episodes}"
            )
        if self.seeds is not None and (len(set(self.seeds)) < len(self.seeds) or not self.seeds):
            raise ConfigError(f"seeds: expected different numbers, got {self.seeds}")
