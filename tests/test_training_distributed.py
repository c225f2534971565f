"""Several processes train as one with their minibatches together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mann_ext.experiments.config import ConfigError, ExperimentConfig, to_json
from mann_ext.experiments.santoro import SantoroConfig
from mann_ext.training import build_optimiser, train
from tests.test_support_query import learner
from tests.tiny_training import metrics_of, start, state_of, tiny

SCRIPT = """
import json, sys
from mann_ext.experiments.config import from_json
from mann_ext.experiments.santoro import SantoroConfig
from mann_ext.training import train
train(from_json(SantoroConfig, json.loads(sys.argv[1])), "tiny", resume=True)
"""


def one_of_two(config: ExperimentConfig, rank: int, port: int) -> None:
    """What torchrun does in each of its processes, without the seconds it takes to start them."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    train(config, "tiny")


def two_processes(config: ExperimentConfig) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(one_of_two, config, rank, port) for rank in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


def torchrun(config: SantoroConfig, folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "--no-python", sys.executable, str(script)]
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, json.dumps(to_json(config))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def trained_by_two(config: ExperimentConfig, minibatches: int) -> dict[str, Tensor]:
    """The weights after one process has trained with the mean gradient of two processes' tasks."""
    tasks = [config.task(torch.device("cpu"), rank) for rank in range(2)]
    torch.manual_seed(config.run.seed)
    model = tasks[0].model()
    optimiser = build_optimiser(model, config.optimiser)
    for _ in range(minibatches):
        optimiser.zero_grad()
        loss = sum(task.loss(model, task.training_episodes.sample())[0] for task in tasks) / 2
        loss.backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(model.parameters(), config.optimiser.clip_norm)
        optimiser.step()
    return model.state_dict()


def test_two_processes_average_the_gradients_of_different_episodes(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = tiny(run_dir, minibatches=4, log_every=2, eval_every=2, final_episodes=8)
    config = replace(config, optimiser=replace(config.optimiser, schedule="constant", warmup=0))
    # Half of it, then resumed: both processes' episodes go on where they were.
    two_processes(replace(config, run=replace(config.run, minibatches=2)))
    torchrun(config, tmp_path)

    state = state_of(run_dir)
    for name, tensor in trained_by_two(config, 4).items():
        torch.testing.assert_close(state["model"][name], tensor, rtol=1e-4, atol=1e-6)
    assert len(state["processes"]) == 2
    records = metrics_of(run_dir)
    assert [(r["kind"], r["step"]) for r in records] == [
        ("train", 2),
        ("eval", 2),
        ("train", 4),
        ("eval", 4),
    ]
    assert records[-1]["episodes"] == 4 * 2 * config.episodes.batch_size
    assert (run_dir / "results.json").is_file()

    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        train(config, "tiny", resume=True)


def test_two_processes_train_a_metanet_with_parameters_that_get_no_gradient(
    tmp_path: Path,
) -> None:
    run = {"run_dir": tmp_path, "minibatches": 3, "eval_every": 0, "final_episodes": 0}
    config = learner("metanet", **run)
    config = replace(config, optimiser=replace(config.optimiser, schedule="constant", warmup=0))
    two_processes(config)
    state = state_of(tmp_path)["model"]
    for name, tensor in trained_by_two(config, 3).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)
