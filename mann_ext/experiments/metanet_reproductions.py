"""The experiments of Munkhdalai & Yu (2017), Meta Networks, as runs to train and to measure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mann_ext.experiments.reproduction import Reproduction, Run
from mann_ext.experiments.support_query import (
    DISTORTED,
    FIVE_WAY,
    LEARNERS,
    MINI_IMAGENET,
    PAPER_ACCURACY,
    STANDARD,
    WAYS,
    SupportQueryConfig,
    with_model,
    with_ways,
)

ALL = tuple(LEARNERS)
COMPARED = ("metanet", "siamese", "matching", "protonet", "knn")
"""Where the paper has no variants."""

PAPER: dict[str, dict[str, dict[str, float]]] = {
    "metanet-omniglot": PAPER_ACCURACY["santoro"],
    "metanet-standard-split": PAPER_ACCURACY["background"],
    "metanet-transfer": {
        "MetaNet, trained 5-way": {"5": 98.95, "10": 96.4, "15": 93.6, "20": 93.07},
        "MetaNet, trained 10-way": {"5": 99.25, "10": 96.87, "15": 96.95, "20": 96.21},
        "MetaNet, trained 15-way": {"5": 99.35, "10": 98.17, "15": 97.11, "20": 96.36},
        "MetaNet, trained 20-way": {"5": 99.55, "10": 98.87, "15": 97.41, "20": 97.0},
    },
    "metanet-mnist": {
        "MetaNet-": {"10": 71.6},
        "MetaNet": {"10": 74.8},
        "MetaNet+": {"10": 72.3},
    },
    "metanet-miniimagenet": PAPER_ACCURACY["miniimagenet"],
}
"""Reproduction -> row -> column -> accuracy in percent; absent where it is not known."""

_SAME = (
    "All learners are trained on tasks of the same kind, one an update, by Adam at 0.001 falling "
    "by a cosine, and measured on the same held-out tasks, 10 queries a class; how many tasks each "
    "was trained on is in the last column, 20,000 where the command gives no time. A MetaNet reads "
    "its fast weights with a strength of 30; the paper has none, which is 1. A training task "
    "has 5 queries a class, and d sees the 2 examples of the largest loss."
)

_CHANGED = "are turned, sheared, stretched and shifted a little"


def _minutes(learner: str, ways: int) -> float:
    """About how long training and measuring take on two cores."""
    each = {"knn": 0.1, "siamese": 5.0, "matching": 5.0, "protonet": 5.0}
    return each.get(learner, 25.0) * ways


def _runs(
    base: SupportQueryConfig,
    learners: Iterable[str],
    ways: Iterable[int],
    preset: str,
    kind: str = "",
    label: str = "",
) -> tuple[Run, ...]:
    """A run for each learner and number of classes, such as ``metanet-5``; the configuration of the
    same name is the same in every reproduction on the same split, so that runs can be shared.

    ``preset``: the preset's name with {ways} for the number; ``kind`` and ``label`` follow the
    learner's in the run's name and label, where one reproduction has it trained in several ways.
    """
    return tuple(
        Run(
            f"{name}{kind}-{number}",
            LEARNERS[name][0] + label,
            with_model(with_ways(base, number), *LEARNERS[name][1:]),
            None if name == "knn" else preset.format(ways=number),
            _minutes(name, number),
        )
        for name in learners
        for number in ways
    )


OMNIGLOT = Reproduction(
    name="metanet-omniglot",
    description="one-shot classification of 5 to 20 characters: MetaNet, its variants, baselines",
    paper=(
        "One-shot accuracy on Omniglot in the split of earlier work: 1,200 characters and their "
        f"quarter turns for training, the others for testing. {_SAME} In rows called distorted "
        f"half of the training images {_CHANGED}."
    ),
    runs=(
        *_runs(FIVE_WAY, ALL, WAYS, "metanet-{ways}way"),
        *_runs(
            DISTORTED,
            ("metanet", "protonet"),
            WAYS,
            "metanet-distorted-{ways}way",
            kind="-distorted",
            label=", distorted",
        ),
    ),
    module="mann_ext.experiments.metanet_results",
)

STANDARD_SPLIT = Reproduction(
    name="metanet-standard-split",
    description="the same for the background and evaluation set, and Lake's 20 one-shot runs",
    paper=(
        "One-shot accuracy on the characters of Omniglot's evaluation set after training on the "
        f"background set and its quarter turns. {_SAME} In half of the training tasks all classes "
        f"are of one alphabet, and half of the training images {_CHANGED}. The 20 runs "
        "of 20-way classification of Lake et al. (2015) show characters of one alphabet at a time, "
        "20 images to classify each; intervals are over the runs. People, Bayesian program "
        "learning and the siamese network of the literature were measured on them."
    ),
    runs=_runs(STANDARD, COMPARED, WAYS, "metanet-standard-{ways}way"),
    module="mann_ext.experiments.metanet_results",
)

TRANSFER = Reproduction(
    name="metanet-transfer",
    description="trained on N classes a task and tested on K, up to 100",
    paper=(
        "Trained on tasks of N classes, tested on tasks of K. Where K is not N, all rows of a "
        "MetaNet's slow output weights are their mean, and fast weights tell the classes apart. "
        f"{_SAME} Tasks of 100 classes have 2 queries a class. The number of held-out tasks is "
        "that of 5 classes; of more classes they are fewer, with as many queries in all."
    ),
    runs=tuple(
        replace(run, label=f"{run.label}, trained {run.config.episodes.ways}-way")
        for run in _runs(FIVE_WAY, ("metanet", "protonet"), WAYS, "metanet-{ways}way")
    ),
    module="mann_ext.experiments.metanet_transfer",
)

FIXED_BASE = Reproduction(
    name="metanet-fixed-base",
    description="the trained base learner replaced by a new, fixed one of 32 or 128 filters",
    paper=(
        "A figure of the paper, whose numbers we do not have: after training, the base learner is "
        "replaced by one with other, random slow weights that are never trained, and 32 or 128 "
        "filters; its fast weights come from the meta learner that was trained with the old one. "
        "The interval is over ten draws of the new slow weights; for the base learner that was "
        "trained, over the tasks."
    ),
    runs=_runs(FIVE_WAY, ("metanet-minus", "metanet", "metanet-plus"), (5,), "metanet-{ways}way"),
    module="mann_ext.experiments.metanet_fixed_base",
)

CONTINUAL = Reproduction(
    name="metanet-continual",
    description="Omniglot, then permuted MNIST with the meta weights kept, and back to Omniglot",
    paper=(
        "The change of accuracy on Omniglot by training on MNIST, whose pixels are permuted, "
        "between +1.24 and -1.7 % in the paper. Here: a MetaNet trained on Omniglot gets new slow "
        "weights for MNIST and keeps its meta weights; all are trained on MNIST; now and then the "
        "meta weights of that moment are put back beside the slow weights for Omniglot, and "
        "measured there on the same held-out tasks as before MNIST."
    ),
    runs=_runs(FIVE_WAY, ("metanet",), (5,), "metanet-{ways}way"),
    module="mann_ext.experiments.metanet_continual",
)

TO_MNIST = Reproduction(
    name="metanet-mnist",
    description="trained on Omniglot, tested on one-shot tasks of the ten digits of MNIST",
    paper=(
        f"One-shot accuracy on the ten digits of MNIST's test set after Omniglot alone. {_SAME} "
        f"The last MetaNet is that of the standard split: half of its training images {_CHANGED}."
    ),
    runs=(
        *_runs(FIVE_WAY, ALL, (10,), "metanet-{ways}way"),
        *_runs(FIVE_WAY, ("metanet",), (20,), "metanet-{ways}way", label=", trained 20-way"),
        *_runs(
            STANDARD,
            ("metanet",),
            (20,),
            "metanet-standard-{ways}way",
            kind="-standard",
            label=", trained 20-way, distorted",
        ),
    ),
    module="mann_ext.experiments.metanet_mnist",
)

TO_MINI_IMAGENET = Reproduction(
    name="metanet-miniimagenet",
    description="one-shot classification of 5 classes of miniImageNet, where its images are",
    paper=(
        "One-shot accuracy on the 20 test classes of miniImageNet, 49.21 ± 0.96 % in the paper. "
        "The images are not downloaded. 15 queries a class."
    ),
    runs=_runs(MINI_IMAGENET, ALL, (5,), "metanet-miniimagenet"),
    module="mann_ext.experiments.metanet_results",
)

REPRODUCTIONS = (
    OMNIGLOT, STANDARD_SPLIT, TRANSFER, FIXED_BASE, CONTINUAL, TO_MNIST, TO_MINI_IMAGENET,
)  # fmt: skip
