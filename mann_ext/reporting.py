"""What a run says while it trains: a progress bar or plain lines, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

PLAIN_LINE_SECONDS = 5.0
"""Least time between two plain lines, so that a quick run does not flood a log file."""

METRICS = "metrics.jsonl"

WIDE = 110
"""Columns of a terminal that all columns of a table of results fit in."""
PIPE_WIDE = 160
"""Columns of a file or a pipe, which have no width of their own."""


class Table(NamedTuple):
    """A table of text; the first column says what each row is.

    narrow: indices of the columns to show where there is no room for all; () shows all.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    narrow: tuple[int, ...] = ()


def print_table(table: Table) -> None:
    """Print a table, with the columns that there is room for."""
    try:
        import rich.table
        from rich.console import Console
    except ImportError:
        print(table.title)
        for first, *others in (table.columns, *table.rows):
            print(f"{first:<28}" + "".join(f" {text:>6}" for text in others))
        return
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to fit
        console = Console(width=PIPE_WIDE)
    print(table.title)
    everything = tuple(range(len(table.columns)))
    shown = table.narrow if table.narrow and console.width < WIDE else everything
    printed = rich.table.Table()
    for index in shown:
        printed.add_column(
            table.columns[index], justify="right" if index else "left", no_wrap=index > 0
        )
    for row in table.rows:
        printed.add_row(*(row[index] for index in shown))
    console.print(printed)


class Reporter:
    """Reports a run to people and to files.

    Args:
        run_dir: folder for metrics.jsonl and ``tensorboard``.
        tensorboard: write TensorBoard logs, if it is installed.
        step: minibatches done before, by the run that is resumed.
        metrics_size: bytes of metrics.jsonl that belong to them; what follows is cut off.
    """

    def __init__(
        self, run_dir: Path, tensorboard: bool, step: int = 0, metrics_size: int = 0
    ) -> None:
        self._path = run_dir / METRICS
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.ftruncate(self._file, metrics_size)
        os.lseek(self._file, 0, os.SEEK_END)
        self._tensorboard = _summary_writer(run_dir / "tensorboard", step) if tensorboard else None
        self._bar = _Bar() if sys.stdout.isatty() and _has_rich() else None
        self._last_line = -PLAIN_LINE_SECONDS

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        if self._tensorboard:
            with contextlib.suppress(OSError):
                self._tensorboard.close()
        os.close(self._file)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._bar:
            self._bar.say(text)
        else:
            _print(text)

    def training(
        self, record: Mapping[str, Any], summary: str, fraction: float, seconds_left: float
    ) -> None:
        """Report the metrics of the last minibatches, which ``summary`` tells in short."""
        self._write({"kind": "train", **record})
        line = f"minibatch {record['step']:,}  loss {record['loss']:.3f}  {summary}"
        rate = record["episodes_per_second"]
        speed = f"{rate:,.{0 if rate >= 10 else 1}f} episodes/s  {clock(seconds_left)} left"
        if self._bar:
            self._bar.update(fraction, line, speed)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            _print(f"{100 * fraction:3.0f} %  {line}  {speed}")

    def evaluation(self, record: Mapping[str, Any], summary: str) -> None:
        """Report the metrics on held-out episodes, which ``summary`` tells in short."""
        self._write({"kind": "eval", **record})
        self.say(f"minibatch {record['step']:,}  {summary}")

    def flushed_size(self) -> int:
        """Bytes in metrics.jsonl, all of them on the disk."""
        os.fsync(self._file)
        return os.lseek(self._file, 0, os.SEEK_CUR)

    def _write(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        if self._tensorboard:
            kind = record["kind"]
            try:
                for name, value in _scalars(record):
                    self._tensorboard.add_scalar(f"{kind}/{name}", value, record["step"])
            except OSError as error:  # a convenience, not worth a run
                self._tensorboard = None
                self.say(f"no more TensorBoard logs: {error}")


class _Bar:
    """A rich progress bar with the speed, and the latest metrics below it."""

    def __init__(self) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        from rich.text import Text

        self._progress = Progress(
            TaskProgressColumn(), BarColumn(), TextColumn("{task.description}"), auto_refresh=False
        )
        self._task = self._progress.add_task("", total=1.0)
        self._metrics = Text("starting")
        self._live = Live(Group(self._progress, self._metrics), refresh_per_second=2)
        self.start, self.stop = self._live.start, self._live.stop

    def update(self, fraction: float, line: str, speed: str) -> None:
        self._progress.update(self._task, completed=fraction, description=speed)
        self._metrics.plain = line

    def say(self, text: str) -> None:
        self._live.console.print(text, highlight=False, markup=False)


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th ..."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number if number < 20 else number % 10, "th")
    return f"{number}{ending}"


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line cut short by a kill is left out."""
    lines = (run_dir / METRICS).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def silence_output() -> None:
    """Send what is printed from now on nowhere, because whoever read it has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the run goes on, for its files
        silence_output()


def _scalars(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    scalars = []
    for name, value in record.items():
        if isinstance(value, (int, float)) and name != "step":
            scalars.append((name, value))
        elif isinstance(value, dict) and name != "half_width_95":
            numbers = {k: v for k, v in value.items() if isinstance(v, (int, float))}
            scalars += [(f"{name}/{k}", v) for k, v in numbers.items()]
    return scalars


def _has_rich() -> bool:
    try:
        import rich.progress  # noqa: F401
    except ImportError:
        return False
    return True


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # What a killed run logged after its checkpoint is hidden.
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
