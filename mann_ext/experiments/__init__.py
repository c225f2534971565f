"""Published results to reproduce: a configuration, presets and what to compare with, for each."""

from __future__ import annotations

from mann_ext.experiments import santoro
from mann_ext.experiments.config import ConfigError
from mann_ext.experiments.santoro import SantoroConfig

PRESETS = santoro.PRESETS

__all__ = ["PRESETS", "ConfigError", "SantoroConfig", "preset"]


def preset(name: str) -> SantoroConfig:
    """The configuration of a preset.

    Raises:
        ConfigError: there is no preset of this name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name][0]
