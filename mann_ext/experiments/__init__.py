"""Published results to reproduce: a configuration, presets and what to compare with, for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mann_ext.experiments import (
    function_reproductions,
    functions,
    metanet_reproductions,
    santoro,
    santoro_reproductions,
    support_query,
)
from mann_ext.experiments.config import ConfigError, ExperimentConfig, from_json
from mann_ext.experiments.functions import QuadraticsConfig, RegressionConfig
from mann_ext.experiments.reproduction import Reproduction
from mann_ext.experiments.santoro import SantoroConfig
from mann_ext.experiments.support_query import SupportQueryConfig

EXPERIMENTS: dict[str, type[ExperimentConfig]] = {
    config.name: config
    for config in (SantoroConfig, RegressionConfig, QuadraticsConfig, SupportQueryConfig)
}
PRESETS: dict[str, tuple[ExperimentConfig, str]] = {
    **santoro.PRESETS,
    **functions.PRESETS,
    **support_query.PRESETS,
}

_ALL = (
    santoro_reproductions.TABLE_1,
    santoro_reproductions.TABLE_2,
    santoro_reproductions.PERSISTENT,
    santoro_reproductions.CURRICULUM,
    santoro_reproductions.ABLATION,
    function_reproductions.REGRESSION,
    function_reproductions.QUADRATIC,
    *metanet_reproductions.REPRODUCTIONS,
)
REPRODUCTIONS: dict[str, Reproduction] = {reproduction.name: reproduction for reproduction in _ALL}

__all__ = [
    "EXPERIMENTS",
    "PRESETS",
    "REPRODUCTIONS",
    "ConfigError",
    "ExperimentConfig",
    "QuadraticsConfig",
    "RegressionConfig",
    "SantoroConfig",
    "SupportQueryConfig",
    "preset",
    "saved_config",
]


def preset(name: str) -> ExperimentConfig:
    """The configuration of a preset.

    Raises:
        ConfigError: there is no preset of this name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name][0]


def saved_config(saved: Mapping[str, Any], where: str) -> ExperimentConfig:
    """The configuration in what a run has saved: its config.json or a checkpoint.

    Raises:
        ConfigError: it is of an experiment that is unknown here, or a field is wrong.
    """
    # Runs were all few-shot ones when they did not say so yet.
    name = saved.get("experiment", SantoroConfig.name)
    if name not in EXPERIMENTS:
        raise ConfigError(
            f"{where}: unknown experiment {name!r}; expected one of {', '.join(EXPERIMENTS)}"
        )
    return from_json(EXPERIMENTS[name], saved["config"], where)
