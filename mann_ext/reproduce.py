"""``mann-ext reproduce``: train what a published result needs, measure it, show it beside theirs.

Results are one JSON file a run and seed, ``RUN-seedN.json``. A folder of results is complete in
itself: the page of tables and the figures are drawn from the files that are in it, so rows can be
added one after the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mann_ext.experiments import REPRODUCTIONS
from mann_ext.experiments.config import ConfigError, differences, from_json
from mann_ext.experiments.reproduction import ReproduceOptions, Reproduction, Results, Run
from mann_ext.reporting import Table, clock, print_table

COMMITTED = Path(__file__).resolve().parents[1] / "results"
"""Folder of the results that are kept with the sources."""
IN_README = ("santoro-table1", "santoro-table2")


def reproduction(name: str) -> Reproduction:
    """The reproduction of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in REPRODUCTIONS:
        raise ConfigError(
            f"unknown reproduction {name!r}; expected one of {', '.join(REPRODUCTIONS)}"
        )
    return REPRODUCTIONS[name]


def listing() -> str:
    """What there is to reproduce, how long it takes, and which results are kept."""
    lines = []
    for entry in REPRODUCTIONS.values():
        minutes = sum(run.minutes for run in entry.runs) * len(entry.seeds)
        have = stored(entry, COMMITTED / entry.name)
        kept = (
            f"results of {len(have)} of {len(entry.runs)} rows are kept" if have else "no results"
        )
        names = ", ".join(f"{run.name}{'*' * (run.name in have)}" for run in entry.runs)
        lines += [
            f"{entry.name}: {entry.description}",
            f"  about {_duration(minutes)} on two cores; {kept}",
            f"  rows: {names}",
        ]
    return "\n".join([*lines, "", "* results are kept: --from-results shows them."])


def reproduce(entry: Reproduction, options: ReproduceOptions) -> int | None:
    """Train, measure and show what the options ask for.

    Returns:
        The number of the signal that stopped it, or None.

    Raises:
        ConfigError: an option does not fit, or there are no results to show.
        CheckpointError, TrainingError, DataError: a run cannot be trained or measured.
    """
    kept = "-kept" * options.from_results
    folder = options.out or Path("runs/reproduce") / f"{entry.name}{kept}"
    runs = entry.chosen(options.only)
    source = COMMITTED / entry.name if options.from_results else folder
    if not options.from_results:
        folder.mkdir(parents=True, exist_ok=True)
        for run in runs:
            for seed in options.seeds or entry.seeds:
                stopped_by = _one(entry, run, seed, folder, options)
                if stopped_by:
                    print("the same command goes on with it")
                    return stopped_by
    results = stored(entry, source)
    if not results:
        raise ConfigError(f"{entry.name}: there are no results in {source} to show")
    folder.mkdir(parents=True, exist_ok=True)
    show(entry, results, folder / f"{entry.name}.md")
    if options.page:
        show(entry, results, options.page, printed=False)
    return None


def _one(
    entry: Reproduction, run: Run, seed: int, folder: Path, options: ReproduceOptions
) -> int | None:
    """Train and measure one run, unless that was done; returns the signal that stopped it."""
    from mann_ext.checkpoint import replace_file

    file = folder / f"{run.name}-seed{seed}.json"
    config = configured(run, seed, folder, options)
    if _is_measured(file, config, options.episodes):
        print(f"{run.name}, seed {seed}: in {file}")
        return None
    print(f"{run.name}, seed {seed}: {run.label}")
    trained = None
    if run.preset is not None:
        from mann_ext.training import train

        outcome = train(config, run.preset, resume=True)
        if outcome.signal is not None:
            return outcome.signal
        trained = outcome.run_dir
    elif config.run.threads:
        import torch

        torch.set_num_threads(config.run.threads)
    # Where the run lies says nothing about the result.
    config = replace(config, run=replace(config.run, run_dir=None))
    values = entry.experiment().measure(run, config, trained, options.episodes)
    replace_file(file, (json.dumps(values, indent=1) + "\n").encode())
    return None


def configured(run: Run, seed: int, folder: Path, options: ReproduceOptions) -> Any:
    """The configuration of a run with what the options change in it."""
    changes: dict[str, Any] = {
        "seed": seed,
        "run_dir": (options.runs or folder) / f"{run.name}-seed{seed}",
        "final_episodes": 0,  # measured by the experiment
        "tensorboard": False,
    }
    if options.threads is not None:
        changes["threads"] = options.threads
    if run.preset is not None and (options.minutes is not None or options.minibatches is not None):
        changes |= {"max_minutes": options.minutes, "minibatches": options.minibatches}
    config = replace(run.config, run=replace(run.config.run, **changes))
    episodes: Any = getattr(config, "episodes", None)
    if hasattr(episodes, "source"):
        data: dict[str, Any] = {"data_root": options.data_root}
        if options.source == "synthetic" or episodes.source == "auto":  # other data stays
            data["source"] = options.source
        config = replace(config, episodes=replace(episodes, **data))
    return config


def _is_measured(file: Path, config: Any, episodes: int) -> bool:
    """Whether a file holds what measuring this configuration would give."""
    if not file.is_file():
        return False
    try:
        values = json.loads(file.read_text())
        before = from_json(type(config), values["config"], str(file))
        budgets = [(each.run.minibatches, each.run.max_minutes) for each in (before, config)]
        return (
            not differences(before, config)
            and budgets[0] == budgets[1]
            and bool(values["episodes"] >= episodes)
        )
    except (ValueError, KeyError, TypeError):
        return False


def stored(entry: Reproduction, folder: Path) -> Results:
    """The results in a folder, by run, in the order of their seeds.

    Raises:
        ConfigError: a file cannot be read.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for run in entry.runs:
        files = {
            int(match[1]): file
            for file in folder.glob(f"{run.name}-seed*.json")
            if (match := re.fullmatch(re.escape(run.name) + r"-seed(\d+)\.json", file.name))
        }
        for _, file in sorted(files.items()):
            try:
                found.setdefault(run.name, []).append(json.loads(file.read_text()))
            except ValueError as error:
                raise ConfigError(f"{file} is damaged: {error}; remove it") from None
    return found


def show(entry: Reproduction, results: Results, page: Path, printed: bool = True) -> None:
    """Write the page of tables and, beside it, the figures; print the tables."""
    from mann_ext import figures
    from mann_ext.checkpoint import replace_file

    experiment = entry.experiment()
    tables = experiment.tables(entry, results)
    if printed:
        for table in tables:
            print_table(table)
    pictures: list[str] = []
    try:
        drawn = experiment.figures(entry, results)
    except ImportError:
        print("no figures: matplotlib is missing (pip install 'mann_ext[figures]')")
        drawn = {}
    for name, figure in drawn.items():
        path = picture(page, name)
        figures.save(figure, path)
        pictures.append(path.name)
    text = markdown(entry, results, tables, pictures)
    replace_file(page, text.encode())
    print(f"tables: {page}")


def picture(page: Path, name: str) -> Path:
    """The file of a page's figure of this name."""
    return page.with_name((f"{page.stem}-{name}" if name else page.stem) + ".png")


def markdown(
    entry: Reproduction, results: Results, tables: Sequence[Table], pictures: Sequence[str]
) -> str:
    """The page of results."""
    description = entry.description[:1].upper() + entry.description[1:]
    parts = [f"# {entry.name}", f"{description}.", entry.paper]
    for table in tables:
        lines = [
            "| " + " | ".join(cell.strip() for cell in row) + " |"
            for row in (table.columns, *table.rows)
        ]
        lines.insert(1, "|---" * len(table.columns) + "|")
        parts += [f"**{table.title}**", "\n".join(lines)]
    parts += [f"![{entry.description}]({name})" for name in pictures]
    parts += [entry.findings] * bool(entry.findings)
    measured = [values for own in results.values() for values in own]
    for name, words in (("data", "Data"), ("machine", "Machine")):
        parts.append(f"{words}: {'; '.join(sorted({values[name] for values in measured}))}.")
    parts.append(f"`mann-ext reproduce {entry.name}` makes this page, and the JSON beside it.")
    return "\n\n".join(parts) + "\n"


def readme_blocks() -> dict[str, str]:
    """What belongs between the marks of each name in README.md: the kept results beside the
    papers'."""
    from mann_ext.experiments import classification, metanet_results

    entries = [REPRODUCTIONS[name] for name in IN_README]
    kept = {entry.name: stored(entry, COMMITTED / entry.name) for entry in entries}
    metanet = REPRODUCTIONS["metanet-omniglot"]
    return {
        "results": classification.compact(kept, entries),
        "metanet": metanet_results.compact(stored(metanet, COMMITTED / metanet.name), metanet),
    }


def split_readme(text: str, name: str) -> tuple[str, str, str]:
    """What is before, between and after the marks of this name.

    Raises:
        ConfigError: the marks are not there, once each and in order.
    """
    start, end = readme_marks(name)
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ConfigError(f"expected {start} and then {end}, once each, around the table")
    before, rest = text.split(start)
    between, after = rest.split(end)
    return before, between, after


def readme_marks(name: str) -> tuple[str, str]:
    """Where a table begins and ends."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def write_readme(path: Path) -> None:
    """Put each of `readme_blocks` between its marks in a Markdown file."""
    from mann_ext.checkpoint import replace_file

    text = path.read_text()
    for name, block in readme_blocks().items():
        start, end = readme_marks(name)
        before, _, after = split_readme(text, name)
        text = f"{before}{start}\n{block}\n{end}{after}"
    replace_file(path, text.encode())
    print(f"results: {path}")


def _duration(minutes: float) -> str:
    return f"{clock(60 * minutes)[:-3]} hours" if minutes >= 60 else f"{minutes:.0f} minutes"
