"""Learning functions from their points, as runs to train and to measure."""

from __future__ import annotations

from dataclasses import replace

from mann_ext.experiments.functions import (
    QUADRATICS,
    REGRESSION_1D,
    REGRESSION_2D,
    REGRESSION_3D,
    RegressionConfig,
)
from mann_ext.experiments.reproduction import Reproduction, Run


def _lstm(config: RegressionConfig) -> RegressionConfig:
    return replace(config, model=replace(config.model, kind="lstm"))


_REGRESSIONS = (
    ("1d", REGRESSION_1D, 90.0),
    ("2d", REGRESSION_2D, 180.0),
    ("3d", REGRESSION_3D, 300.0),
)

REGRESSION = Reproduction(
    name="santoro-regression",
    description="functions of 1 to 3 variables from a Gaussian process, against the exact process",
    paper=(
        "Figures 5 and 6 of Santoro et al. (2016), figures without numbers: predictions after some "
        "points of a function, and the likelihood of the next point by how many were seen, beside "
        "the Gaussian process that the functions are from. Its hyper-parameters are not stated."
    ),
    runs=tuple(
        run
        for name, config, minutes in _REGRESSIONS
        for run in (
            Run(f"mann-{name}", "MANN", config, f"santoro-regression-{name}", minutes),
            Run(f"lstm-{name}", "LSTM", _lstm(config), f"santoro-regression-{name}", minutes / 3),
        )
    ),
    module="mann_ext.experiments.function_results",
)

QUADRATIC = Reproduction(
    name="hochreiter-quadratics",
    description="never-seen quadratic functions, learned by an LSTM with frozen weights",
    paper="Quadratic functions of Hochreiter, Younger & Conwell (2001).",
    runs=(Run("lstm", "LSTM", QUADRATICS, "hochreiter-quadratics", 20),),
    module="mann_ext.experiments.function_results",
)
