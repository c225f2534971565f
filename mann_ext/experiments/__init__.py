"""Published results to reproduce: a configuration, presets and what to compare with, for each."""

from __future__ import annotations

from mann_ext.experiments import santoro, santoro_reproductions
from mann_ext.experiments.config import ConfigError
from mann_ext.experiments.reproduction import Reproduction
from mann_ext.experiments.santoro import SantoroConfig

PRESETS = santoro.PRESETS

_ALL = (
    santoro_reproductions.TABLE_1,
    santoro_reproductions.TABLE_2,
    santoro_reproductions.PERSISTENT,
    santoro_reproductions.CURRICULUM,
    santoro_reproductions.ABLATION,
)
REPRODUCTIONS: dict[str, Reproduction] = {reproduction.name: reproduction for reproduction in _ALL}

__all__ = ["PRESETS", "REPRODUCTIONS", "ConfigError", "SantoroConfig", "preset"]


def preset(name: str) -> SantoroConfig:
    """The configuration of a preset.

    Raises:
        ConfigError: there is no preset of this name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name][0]
