"""The training loop: schedule, logs, checkpoints, resuming, several processes, evaluation.

A run lives in one folder: ``config.json``, ``metrics.jsonl``, ``checkpoints/``, and at the end
``results.json`` and a figure. What is trained is a task's affair: see `mann_ext.experiments.task`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mann_ext import checkpoint, distributed, evaluation
from mann_ext.checkpoint import CheckpointError
from mann_ext.distributed import Processes
from mann_ext.experiments import ExperimentConfig, saved_config
from mann_ext.experiments.config import (
    ConfigError,
    OptimiserConfig,
    RunConfig,
    differences,
    to_json,
)
from mann_ext.experiments.santoro import EvalOptions
from mann_ext.experiments.task import Task
from mann_ext.models import pretrained
from mann_ext.reporting import Reporter

CONFIG = "config.json"
RESULTS = "results.json"
CHECKPOINTS = "checkpoints"


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    results: what results.json holds, or None if the run was stopped early or not evaluated.
    signal: number of the signal that stopped it, or None.
    """

    run_dir: Path
    step: int
    results: dict[str, Any] | None
    signal: int | None = None


def train(config: ExperimentConfig, preset: str = "run", *, resume: bool = False) -> Outcome:
    """Train a model, with everything that belongs to it, and evaluate it on held-out episodes.

    SIGINT (Ctrl-C) and SIGTERM save a checkpoint and end the run; a second one ends it at once.
    Under ``torchrun`` every process trains on its own episodes and gradients are averaged.

    Args:
        config: the experiment.
        preset: its name, for the folder and the results.
        resume: go on from the newest checkpoint in ``config.run.run_dir``, or in the preset's
            newest run; from the start, if that folder has none yet, so that one command starts a
            run and goes on with it. On the CPU, and with a limit in minibatches, the result is
            bit for bit that of a run that was never stopped.

    Raises:
        ConfigError: the configuration cannot be run.
        CheckpointError: a checkpoint cannot be written or read.
        TrainingError: the run cannot start or go on.
    """
    device_type = _device(config.run.device).type
    processes = distributed.join(device_type)
    try:
        return _train(config, preset, resume, processes)
    finally:
        distributed.leave(processes)


def _train(config: ExperimentConfig, preset: str, resume: bool, processes: Processes) -> Outcome:
    run = config.run
    device = _device(run.device)
    if device.type == "cuda" and processes.count > 1:
        device = torch.device("cuda", processes.local_rank)
    torch.set_num_threads(run.threads or max(1, evaluation.usable_cpus() // processes.local_count))
    run_dir = Path(processes.share(str(run_folder(run, preset, resume))))
    with contextlib.ExitStack() as stack:
        saved = None
        if processes.first:
            stack.enter_context(_claimed(run_dir))
            saved = checkpoint.latest(run_dir / CHECKPOINTS)
            if (saved or (run_dir / CONFIG).is_file()) and not resume:
                raise TrainingError(
                    f"{run_dir} already holds a run; go on with it by --resume, or choose "
                    "another --run-dir"
                )
        saved = processes.share(saved)
        state = checkpoint.load(saved) if saved else {}
        if saved:
            _check_same_run(state, config, processes, saved)

        if not processes.first:
            processes.share(None)  # the first process may have to download the data
        task = config.task(device, processes.rank)
        if processes.first:
            processes.share(None)
        torch.manual_seed(run.seed)
        model = task.model()
        optimiser = build_optimiser(model, config.optimiser)
        progress = Progress(totals=torch.zeros(2 + 2 * task.columns, dtype=torch.float64))
        if saved:
            checkpoint.load_weights(model, state["model"], saved)
            optimiser.load_state_dict(state["optimiser"])
            progress = Progress(**state["progress"])
            mine = state["processes"][processes.rank]
            task.training_episodes.load_state_dict(mine["sampler"])
            checkpoint.set_random_state(mine["random"], device)
        else:
            torch.manual_seed(run.seed + processes.rank)
        # A resumed run keeps its number of threads, on which the last bits depend.
        progress.threads = run.threads or progress.threads or _threads(task, model, processes)
        torch.set_num_threads(progress.threads)

        reporter = None
        if processes.first:
            checkpoint.replace_file(run_dir / CONFIG, _config_json(config, preset))
            reporter = stack.enter_context(
                Reporter(run_dir, run.tensorboard, progress.step, progress.metrics_size)
            )
            size = sum(parameter.numel() for parameter in model.parameters())
            begun = f"going on from {saved}" if saved else f"from the start, in {run_dir}"
            where = f"{device}, {progress.threads} thread{'s' * (progress.threads > 1)}"
            reporter.say(f"{preset}: {size:,} parameters, {task.data_name}, {where}; {begun}")
        loop = Loop(task, model, optimiser, progress, run_dir, processes, reporter, preset)
        stopped_by = loop.run()
        if stopped_by is not None and reporter:
            reporter.say(
                f"stopped and saved at minibatch {progress.step:,}; go on with\n"
                f"  mann-ext train {preset} --run-dir {run_dir} --resume"
            )

    if not processes.first or stopped_by is not None or not run.final_episodes:
        return Outcome(run_dir, progress.step, None, stopped_by)
    return _finish(task, model, progress, run_dir, preset, processes)


@dataclass(kw_only=True)
class Progress:
    """How far a run is; saved with it."""

    step: int = 0
    seconds: float = 0.0
    """Time spent training, over all resumptions."""
    totals: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Since the last log line: losses, gradient norms, and the metric's sums and counts."""
    metrics_size: int = 0
    threads: int = 0


@dataclass
class Loop:
    """The minibatches of a run."""

    task: Task
    model: nn.Module
    optimiser: torch.optim.Optimizer
    progress: Progress
    run_dir: Path
    processes: Processes
    reporter: Reporter | None
    preset: str

    def run(self) -> int | None:
        """Train until the budget is spent or a signal comes; returns the signal's number."""
        run, optimiser, progress = self.task.config.run, self.optimiser, self.progress
        schedule = self.task.config.optimiser
        clip_norm = schedule.clip_norm or math.inf
        network = self._network()
        episodes = self.task.training_episodes
        parameters = list(self.model.parameters())
        totals = progress.totals = progress.totals.to(self.task.device)
        self.model.train()
        started = time.perf_counter() - progress.seconds
        logged_seconds, logged_step = progress.seconds, progress.step

        with _stop_signals() as stop:
            while True:
                progress.seconds = time.perf_counter() - started
                signal_number, spent = self.processes.agree(stop.number, self._spent())
                if signal_number or spent >= 1.0:
                    break
                rate = learning_rate(schedule, progress.step, spent)
                for group in optimiser.param_groups:
                    group["lr"] = rate

                loss, tally = self.task.loss(network, episodes.sample())
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
                optimiser.step()
                totals += torch.cat((torch.stack((loss.detach(), norm)), tally.flatten()))
                progress.step += 1

                if progress.step % run.log_every == 0:
                    progress.seconds = time.perf_counter() - started
                    minibatches = progress.step - logged_step
                    self._log(rate, minibatches, progress.seconds - logged_seconds)
                    totals.zero_()
                evaluating = run.eval_every and progress.step % run.eval_every == 0
                if evaluating:
                    self._evaluate()
                if progress.step % run.checkpoint_every == 0:
                    progress.seconds = time.perf_counter() - started
                    self._save()
                if progress.step % run.log_every == 0:
                    logged_seconds, logged_step = time.perf_counter() - started, progress.step
            self._save()
        return int(signal_number) or None

    def _network(self) -> nn.Module:
        network = self.model
        if self.processes.count > 1:
            on_gpu = self.task.device.type == "cuda"
            devices = [self.task.device.index] if on_gpu else None
            network = DistributedDataParallel(
                network, device_ids=devices, find_unused_parameters=self.task.unused_parameters
            )
        return torch.compile(network) if self.task.config.run.compile else network  # type: ignore

    def _spent(self) -> float:
        """Share of the run's budget that is spent."""
        run = self.task.config.run
        spent = [0.0]
        if run.minibatches is not None:
            spent.append(self.progress.step / run.minibatches if run.minibatches else 1.0)
        if run.max_minutes is not None:
            minutes = self.progress.seconds / 60
            spent.append(minutes / run.max_minutes if run.max_minutes else 1.0)
        return max(spent)

    def _log(self, rate: float, minibatches: int, seconds: float) -> None:
        """Report the minibatches since the last time; the device is waited for here only."""
        window = self.task.config.run.log_every
        everyone = self.processes.gather(self.progress.totals.tolist())
        loss, norm, *tally = (sum(values) for values in zip(*everyone, strict=True))
        if not math.isfinite(loss + norm):
            previous = checkpoint.latest(self.run_dir / CHECKPOINTS)
            raise TrainingError(
                f"the loss or its gradient became infinite or not a number in the {window} "
                f"minibatches before {self.progress.step}; try a lower --learning-rate"
                + (f" (the last checkpoint is {previous})" if previous else "")
            )
        if self.reporter is None:
            return
        average = 1.0 / (window * self.processes.count)
        sums, counts = tally[: self.task.columns], tally[self.task.columns :]
        means = [a / b if b else math.nan for a, b in zip(sums, counts, strict=True)]
        metrics = self.task.metrics(means)
        per_minibatch = self.task.config.episodes.batch_size * self.processes.count
        record = {
            "step": self.progress.step,
            "episodes": self.progress.step * per_minibatch,
            "loss": loss * average,
            **metrics,
            "gradient_norm": norm * average,
            "learning_rate": rate,
            "seconds": round(self.progress.seconds, 3),
            "episodes_per_second": round(minibatches * per_minibatch / seconds, 1),
        }
        spent = self._spent()
        left = self.progress.seconds * (1 - spent) / spent if spent else 0.0
        self.reporter.training(record, self.task.summary(metrics), spent, left)

    def _evaluate(self) -> None:
        """Report the metrics on held-out episodes; the other processes wait at the next step."""
        if self.reporter is None:
            return
        task, config = self.task, self.task.config
        _, metrics = task.evaluate(self.model, config.run.eval_episodes)
        per_minibatch = config.episodes.batch_size * self.processes.count
        self.reporter.evaluation(
            {
                "step": self.progress.step,
                "episodes": self.progress.step * per_minibatch,
                **metrics,
            },
            f"{task.held_out}  {task.summary(metrics)}",
        )

    def _save(self) -> None:
        """Write a checkpoint, with the state of every process."""
        if not torch.isfinite(self.progress.totals).all():
            self._log(0.0, 1, 1.0)
        mine = {
            "sampler": self.task.training_episodes.state_dict(),
            "random": checkpoint.random_state(self.task.device),
        }
        everyone = self.processes.gather(mine)
        if self.reporter is None:
            return
        self.progress.metrics_size = self.reporter.flushed_size()
        state = {
            "preset": self.preset,
            "experiment": self.task.config.name,
            "config": to_json(self.task.config),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": dict(vars(self.progress)),
            "processes": everyone,
        }
        folder, keep = self.run_dir / CHECKPOINTS, self.task.config.run.keep_checkpoints
        checkpoint.save(folder, self.progress.step, state, keep)


def learning_rate(config: OptimiserConfig, step: int, spent: float) -> float:
    """The learning rate at minibatch ``step`` when ``spent`` of the budget is used.

    Linear warm-up times, with s = spent and f = final_learning_rate,
    cosine: f + (1 - f) (1 + cos(pi s)) / 2; linear: 1 - (1 - f) s; constant: 1.
    """
    rate = config.learning_rate
    if config.schedule != "constant":
        spent = min(spent, 1.0)
        left = 1 - spent if config.schedule == "linear" else (1 + math.cos(math.pi * spent)) / 2
        rate *= config.final_learning_rate + (1 - config.final_learning_rate) * left
    return rate * min(1.0, (step + 1) / config.warmup) if config.warmup else rate


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """The optimiser that ``config`` describes.

    Raises:
        ConfigError: the model has nothing to train.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model: {type(model).__name__} has no parameters to train")
    if config.optimiser == "adam":
        return torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return torch.optim.RMSprop(
        model.parameters(),
        lr=config.learning_rate,
        alpha=config.rmsprop_decay,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        foreach=True,
    )


def load_run(
    path: Path, config: ExperimentConfig | None = None
) -> tuple[Task, nn.Module, str, Progress]:
    """The task, the trained model, its preset's name and how far it was trained.

    Args:
        path: a run's folder, one of its checkpoints, or the name of a pretrained model.
        config: used instead of the configuration that was trained with, if given.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or of another model.
    """
    state, found = _saved_state(path)
    config = config or saved_config(state, str(found))
    task = config.task(_device(config.run.device))
    model = task.model()
    checkpoint.load_weights(model, state["model"], found)
    return task, model.eval(), state["preset"], Progress(**state["progress"])


def evaluate_run(path: Path, options: EvalOptions) -> dict[str, Any]:
    """Evaluate a trained model on held-out episodes, print the table and return the results.

    Args:
        path: a run's folder, one of its checkpoints, or the name of a pretrained model.
        options: what to change from the evaluation at the end of the training.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or of another model.
        ConfigError: an option is not one of this experiment, or out of range.
    """
    changes = {name: value for name, value in vars(options).items() if value is not None}
    config, _ = load_config(path)
    parts = {
        part: {name: value for name, value in changes.items() if hasattr(before, name)}
        for part, before in vars(config).items()
    }
    known = {"episodes", "json"}.union(*parts.values())
    for name in changes:
        if name not in known:
            raise ConfigError(f"{name}: {path} is a run of {config.name}, which has no such option")
    config = dataclasses.replace(
        config,
        **{
            part: dataclasses.replace(getattr(config, part), **values)
            for part, values in parts.items()
        },
    )
    cpus = evaluation.usable_cpus()
    torch.set_num_threads(config.run.threads or cpus)
    task, model, preset, progress = load_run(path, config)
    torch.set_num_threads(config.run.threads or min(progress.threads or cpus, cpus))
    results = evaluation.results(
        task,
        model,
        options.episodes,
        preset=preset,
        step=progress.step,
        training_seconds=progress.seconds,
    )
    evaluation.publish(results, task.table(results), options.json)
    return results


def load_config(path: Path) -> tuple[ExperimentConfig, str]:
    """The configuration of a run, checkpoint or pretrained model, and its preset's name."""
    file = path / CONFIG
    if not file.is_file():
        state, _ = _saved_state(path)
        return saved_config(state, str(path)), state["preset"]
    try:
        saved = json.loads(file.read_text())
        return saved_config(saved, str(file)), saved["preset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file} cannot be read: {error}") from None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``, or the newest one of the run at ``path``."""
    if (path / checkpoint.STATE).is_file():
        return path
    found = checkpoint.latest(path / CHECKPOINTS) or checkpoint.latest(path)
    if found is None:
        raise CheckpointError(
            f"no checkpoint in {path}; expected a run's folder, a checkpoint or the name of a "
            f"pretrained model ({', '.join(pretrained.names())})"
        )
    return found


def _saved_state(path: Path) -> tuple[dict[str, Any], Path]:
    """What a checkpoint holds, and where it is; of a pretrained model, what was kept of that."""
    if not path.exists() and str(path) in pretrained.names():
        parameters, metadata = pretrained.load(str(path))
        return {"model": parameters, **metadata["run"]}, path
    found = find_checkpoint(path)
    return checkpoint.load(found), found


def run_folder(run: RunConfig, preset: str, resume: bool) -> Path:
    """The folder of a new run, or of the one to resume."""
    if run.run_dir is not None:
        return run.run_dir
    if not resume:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        return Path("runs") / f"{preset}-{now}"
    stamp = "[0-9]" * 8 + "-" + "[0-9]" * 6
    earlier = sorted(path.parent for path in Path("runs").glob(f"{preset}-{stamp}/{CONFIG}"))
    if not earlier:
        raise TrainingError(f"no run of {preset} in runs to resume; name its folder by --run-dir")
    return earlier[-1]


def _threads(task: Task, model: nn.Module, processes: Processes) -> int:
    """The number of CPU threads with which a minibatch is quickest, by trying a few.

    More are not always better: steps this small soon spend their time waiting for each other, above
    all where other programs use the same CPUs.
    """
    most = max(1, evaluation.usable_cpus() // processes.local_count)
    if task.device.type != "cpu" or processes.count > 1:
        return most
    random, episodes = checkpoint.random_state(task.device), task.training_episodes
    before = episodes.state_dict()
    best, shortest = 1, math.inf
    for threads in [*(2**power for power in range(most.bit_length()) if 2**power < most), most]:
        torch.set_num_threads(threads)
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            task.loss(model, episodes.sample())[0].backward()
            seconds.append(time.perf_counter() - started)
            model.zero_grad(set_to_none=True)
        if min(seconds) > shortest:
            break
        best, shortest = threads, min(seconds)
    episodes.load_state_dict(before)
    checkpoint.set_random_state(random, task.device)
    return best


def _finish(
    task: Task,
    model: nn.Module,
    progress: Progress,
    run_dir: Path,
    preset: str,
    processes: Processes,
) -> Outcome:
    run = task.config.run
    try:
        results = evaluation.results(
            task,
            model,
            run.final_episodes,
            preset=preset,
            step=progress.step,
            training_seconds=progress.seconds,
            processes=processes.count,
        )
    except KeyboardInterrupt:
        print(f"the training is complete and saved; evaluate it with\n  mann-ext eval {run_dir}")
        raise
    evaluation.publish(results, task.table(results), run_dir / RESULTS)
    print(f"results: {run_dir / RESULTS}")
    if run.figure:
        task.draw(run_dir)
    return Outcome(run_dir, progress.step, results)


def _config_json(config: ExperimentConfig, preset: str) -> bytes:
    saved = {"preset": preset, "experiment": config.name, "config": to_json(config)}
    return (json.dumps(saved, indent=1) + "\n").encode()


def _check_same_run(
    state: dict[str, Any], config: ExperimentConfig, processes: Processes, saved: Path
) -> None:
    before = saved_config(state, str(saved))
    if type(before) is not type(config):
        raise ConfigError(f"{saved} is a run of {before.name}, and this one is of {config.name}")
    changed = differences(before, config)
    if changed:
        raise ConfigError(
            f"{saved} was trained with another configuration ({'; '.join(changed)}); resume it "
            "with its own, or start a new run"
        )
    count = len(state["processes"])
    if count != processes.count:
        raise ConfigError(
            f"{saved} was written by {count} processes, and this run has {processes.count}; "
            f"resume it with torchrun --nproc-per-node {count}"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: {name!r} cannot be used here ({reason})") from None
    return device


@contextlib.contextmanager
def _claimed(run_dir: Path) -> Iterator[None]:
    """Make the folder of a run and keep other processes out of it; a killed one lets go."""
    try:
        (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise TrainingError(f"cannot write in the run's folder {run_dir}: {error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"another process is training in {run_dir}") from None
        yield
    finally:
        os.close(lock)
        if not (run_dir / CONFIG).exists():  # nothing was begun, so nothing is left behind
            (run_dir / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                (run_dir / CHECKPOINTS).rmdir()
                run_dir.rmdir()


@dataclass
class _Stop:
    number: int = 0


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Note the first SIGINT or SIGTERM; the second has its usual effect."""
    stop = _Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.number = number
        for name, handler in usual.items():
            signal.signal(name, handler)

    usual = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        for name in usual:
            signal.signal(name, note)
    except ValueError:  # not in the main thread: signals are somebody else's business
        yield stop
        return
    try:
        yield stop
    finally:
        for name, handler in usual.items():
            signal.signal(name, handler)
