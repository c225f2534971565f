"""A run of a second: a tiny network on tiny synthetic data, in this process or in another one."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mann_ext import checkpoint
from mann_ext.experiments.config import OptimiserConfig, RunConfig
from mann_ext.experiments.santoro import EpisodesConfig, ModelConfig, SantoroConfig

CONTEXT = multiprocessing.get_context("forkserver")
# torch.optim imports torch._dynamo at its first use, which takes a second.
CONTEXT.set_forkserver_preload(["mann_ext.training", "mann_ext.cli", "torch._dynamo"])

TINY = SantoroConfig(
    model=ModelConfig(hidden_size=12, num_slots=8, slot_size=6, num_reads=2),
    episodes=EpisodesConfig(
        source="synthetic", synthetic_classes=24, ways=3, length=9, batch_size=4
    ),
    optimiser=OptimiserConfig(learning_rate=3e-3, warmup=5),
    run=RunConfig(
        minibatches=60,
        log_every=5,
        eval_every=20,
        eval_episodes=8,
        final_episodes=40,
        checkpoint_every=3,
        threads=1,
        tensorboard=False,
        figure=False,
    ),
)


def tiny(run_dir: Path, **run: Any) -> SantoroConfig:
    """The tiny configuration, with fields of its ``run`` changed."""
    return replace(TINY, run=replace(TINY.run, run_dir=run_dir, **run))


def start(target: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a fresh process that has everything imported already."""
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def train_here(config: SantoroConfig, resume: bool = False) -> None:
    """Train in this process."""
    from mann_ext.training import train

    train(config, "tiny", resume=resume)


def wait_for_checkpoint(run_dir: Path, after: Path | None, process: Any) -> None:
    """Wait until there is another checkpoint than ``after``, or the process has ended."""
    end = time.monotonic() + 60
    while checkpoint.latest(run_dir / "checkpoints") == after and process.is_alive():
        assert time.monotonic() < end, "no checkpoint within a minute"
        time.sleep(0.002)


def kill(process: Any, number: int = signal.SIGKILL) -> None:
    if process.is_alive():
        os.kill(process.pid, number)
    process.join(60)


def state_of(run_dir: Path) -> dict[str, Any]:
    """The newest checkpoint, without what depends on the clock."""
    newest = checkpoint.latest(run_dir / "checkpoints")
    assert newest is not None
    state = checkpoint.load(newest)
    del state["progress"]["seconds"], state["progress"]["metrics_size"], state["config"]["run"]
    return state


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    from mann_ext.reporting import read_metrics

    timed = ("seconds", "episodes_per_second")
    return [
        {name: value for name, value in record.items() if name not in timed}
        for record in read_metrics(run_dir)
    ]


def assert_same_state(left: Any, right: Any) -> None:
    """Equal bit for bit."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same_state(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same_state(a, b)
    else:
        assert left == right


def random_delays(count: int, longest: float) -> list[float]:
    """Other moments in every run of the tests: what is promised holds at any."""
    source = random.Random()
    return [source.uniform(0.0, longest) for _ in range(count)]
