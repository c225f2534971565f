"""The command line: what it does, and that every mistake gets one clear line and exit code 2."""

from __future__ import annotations

import importlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mann_ext import checkpoint, cli
from mann_ext.experiments import PRESETS
from tests.tiny_training import assert_same_state, kill, start, state_of, wait_for_checkpoint

SMALL = (
    "--source synthetic --synthetic-classes 24 --ways 2 --length 6 --batch-size 4 "
    "--hidden-size 8 --num-slots 6 --slot-size 4 --num-reads 2 --threads 1 --log-every 2 "
    "--eval-every 4 --eval-episodes 4 --final-episodes 8 --checkpoint-every 4 --no-tensorboard"
).split()


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


def run(*words: object) -> int:
    """The exit code of ``mann-ext WORDS``, in this process."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_train_evaluate_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert run("train", "demo", *SMALL, "--minibatches", 8, "--run-dir", folder) == 0
    out = capsys.readouterr().out
    assert "synthetic glyphs" in out
    assert "95 % interval" in out
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "results.json", "accuracy.png"} <= names
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    assert run("eval", folder, "--episodes", 8, "--json", tmp_path / "eval.json") == 0
    stored = json.loads((folder / "results.json").read_text())
    again = json.loads((tmp_path / "eval.json").read_text())
    assert again["accuracy"] == stored["accuracy"]

    # Only what changes has to be said: the rest is the run's own.
    assert run("train", "demo", "--resume", "--run-dir", folder, "--minibatches", 12) == 0
    assert state_of(folder)["progress"]["step"] == 12
    assert json.loads((folder / "config.json").read_text())["config"]["run"]["minibatches"] == 12


def test_without_a_folder_the_newest_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", "demo", *SMALL, "--minibatches", 4, "--no-figure") == 0
    assert run("train", "demo", "--resume", "--minibatches", 6) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert state_of(folder)["progress"]["step"] == 6


def _main(words: list[str]) -> None:
    sys.exit(cli.main(words))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    words = ["train", "demo", *SMALL, "--run-dir", str(tmp_path)]
    process = start(_main, [*words, "--minibatches", "1000000"])
    wait_for_checkpoint(tmp_path, None, process)
    kill(process, signal.SIGINT)
    assert process.exitcode == 130
    stopped_at = state_of(tmp_path)["progress"]["step"]
    end = str(stopped_at + 5)
    assert run("train", "demo", "--resume", "--run-dir", tmp_path, "--minibatches", end) == 0
    assert state_of(tmp_path)["progress"]["step"] == stopped_at + 5


def _main_on_a_full_disk(words: list[str], log: Path) -> None:
    # Files cannot grow beyond this size: enough for metrics, too little for a checkpoint.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    sys.stderr = log.open("w")
    sys.exit(cli.main(words))


def test_a_full_disk_ends_the_run_and_loses_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["train", "demo", *SMALL, "--no-figure", "--run-dir", str(folder)]
    assert run(*words, "--minibatches", 4) == 0
    before = state_of(folder)
    more = ["train", "demo", "--resume", "--run-dir", str(folder), "--minibatches", "8"]
    process = start(_main_on_a_full_disk, more, tmp_path / "log")
    process.join(60)
    assert process.exitcode == 2
    message = (tmp_path / "log").read_text()
    assert "could not write the checkpoint" in message
    assert "step-000000004 is intact" in message
    assert_same_state(state_of(folder), before)
    assert len(list((folder / "checkpoints").iterdir())) == 1, "nothing half-written is left"
    assert run(*more) == 0


def _main_nobody_reads(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    sys.exit(cli.main(words))


def test_a_run_whose_output_is_closed_goes_on(tmp_path: Path) -> None:
    help_only = start(_main_nobody_reads, ["train", "demo", "--help"])
    words = ["train", "demo", *SMALL, "--minibatches", "8", "--no-figure"]
    process = start(_main_nobody_reads, [*words, "--run-dir", str(tmp_path)])
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "results.json").is_file()
    help_only.join(60)
    assert help_only.exitcode == 141


def test_results_are_shown_even_where_they_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "demo", *SMALL, "--minibatches", 4, "--no-figure"]
    assert run(*train, "--final-episodes", 0, "--run-dir", tmp_path / "run") == 0
    capsys.readouterr()
    file = tmp_path / "not" / "there.json"
    assert run("eval", tmp_path / "run", "--episodes", 8, "--json", file) == 2
    captured = capsys.readouterr()
    assert "this run" in captured.out
    assert "No such file" in captured.err


HELP = """
import sys
from mann_ext import cli
cli.main(["--help"])
cli.main(["train", "--help"])
heavy = {"tyro", "rich", "matplotlib", "tensorboard", "mann_ext.training"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "train PRESET" in done.stdout
    assert all(name in done.stdout for name in PRESETS)


FAULTS = """
import resource
import sys

import torch

from mann_ext import cli

if sys.argv[1] == "kept":
    cli.main(["train", "--help"])


def minibatch():
    return len([torch.ones(6 << 20) for _ in range(5)])


minibatch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    minibatch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's malloc")
def test_freed_memory_is_kept_for_the_next_minibatch() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return int(done.stdout.split()[-1])

    assert faults("kept") < faults("given back") / 2


def test_info_prints_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info") == 0
    assert "torch:" in capsys.readouterr().out


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", name, "--help") == 0
    assert "--learning-rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage"),
        (["trian"], "unknown command 'trian'; expected train, eval, inspect, reproduce, info"),
        (["train"], "presets"),
        (["train", "dmeo"], "unknown preset 'dmeo'; expected one of demo"),
        (["train", "demo", "--wayz", "5"], "--ways"),
        (["train", "demo", "--ways", "many"], "many"),
        (["train", "demo", "--ways", "0"], "ways: expected at least 1, got 0"),
        (["train", "demo", "--grow-every", "9"], "grow_every, ways_most: expected both"),
        (["train", "demo", "--learning-rate", "-1"], "learning_rate: expected at least 0"),
        (["train", "demo", "--max-minutes", "None"], "at least one limit"),
        (["train", "demo", "--device", "abacus"], "device: 'abacus' cannot be used"),
        (["train", "demo", "--resume"], "no run of demo in runs to resume"),
        (["eval"], "expected a run's folder"),
        (["eval", "nowhere"], "no checkpoint in nowhere"),
        (["eval", "nowhere", "--episodes", "x"], "x"),
    ],
)
def test_mistakes_get_one_clear_message(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that says why ``mann-ext WORDS`` was refused."""
    capsys.readouterr()
    assert run(*words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mann-ext: ")
    return lines[0]


def test_arguments_the_model_or_the_data_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "demo", *SMALL, "--minibatches", 2, "--run-dir", tmp_path / "run"]
    assert "20-way episodes need" in refused(capsys, *train, "--ways", 20)
    assert "read_strength" in refused(capsys, *train, "--read-strength", -1)


def test_missing_and_damaged_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("mann_ext.data.omniglot")
    monkeypatch.setattr(module, "ADDRESS", "http://127.0.0.1:9/")
    root = tmp_path / "data"
    train = ["train", "demo", *SMALL, "--minibatches", 2, "--run-dir", tmp_path / "run"]
    train += ["--source", "omniglot", "--data-root", root]
    assert "Omniglot was not found" in refused(capsys, *train)
    root.mkdir(exist_ok=True)
    (root / "omniglot.npz").write_bytes(b"PK\x03\x04 not a whole archive")
    assert "damaged" in refused(capsys, *train)
    assert not (tmp_path / "run").exists(), "a run that did not begin leaves nothing"


def test_folders_and_checkpoints_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train = ["train", "demo", *SMALL, "--minibatches", 4, "--no-figure"]
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(capsys, *train, "--run-dir", tmp_path / "file" / "run")
    assert run(*train, "--run-dir", folder) == 0
    before = state_of(folder)
    resume = ["train", "demo", "--resume", "--run-dir", folder]
    assert "already holds a run" in refused(capsys, *train, "--run-dir", folder)
    assert "hidden_size: 8, now 9" in refused(capsys, *resume, "--hidden-size", 9)
    other = ["train", "santoro-5way", "--resume", "--run-dir", folder]
    assert "a run of preset demo, not of santoro-5way" in refused(capsys, *other)
    assert "another model" not in refused(capsys, "eval", folder, "--ways", 50)
    assert "another model" in refused(capsys, "eval", folder, "--ways", 3)
    assert_same_state(state_of(folder), before)

    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None
    copy = tmp_path / "copy"
    shutil.copytree(newest, copy)
    os.truncate(copy / "tensors.safetensors", 100)
    assert "copy is damaged" in refused(capsys, "eval", copy)
    os.truncate(newest / "state.json", 100)
    assert "is damaged" in refused(capsys, *resume)
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(capsys, *resume)
