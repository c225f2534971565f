"""The command line: ``mann-ext train``, ``eval``, ``inspect``, ``reproduce`` and ``info``.

Nothing heavy is imported before it is needed, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from mann_ext.experiments import PRESETS, ExperimentConfig, preset
from mann_ext.experiments.reproduction import ReproduceOptions
from mann_ext.experiments.santoro import EvalOptions, InspectOptions
from mann_ext.reporting import silence_output

USAGE = """\
usage: mann-ext COMMAND ...

  train PRESET [--FIELD VALUE ...] [--resume]   train and evaluate a model
  eval RUN [--FIELD VALUE ...]                  evaluate a trained model on held-out episodes
  inspect RUN [--FIELD VALUE ...]               show what a model's memory did in an episode
  reproduce NAME [--FIELD VALUE ...]            a paper's table or figure; --list says which
  info                                          print versions and how the operators were built

mann-ext COMMAND --help says more.

exit codes: 0 done; 1 unexpected error; 2 bad input or a failed read or write, nothing is lost;
130 Ctrl-C (the run is saved); 143 terminated (the run is saved); 141 output closed early
"""

REPRODUCE_USAGE = """\
usage: mann-ext reproduce --list            what there is to reproduce
       mann-ext reproduce NAME [--FIELD VALUE ...]
       mann-ext reproduce --readme FILE     put the kept results between FILE's marks

mann-ext reproduce NAME --help lists the fields."""

RUN = "RUN: a run's folder, a checkpoint, or a pretrained model, such as omniglot-5way"


class UsageError(ValueError):
    """A command line that cannot be understood."""


ConfigT = TypeVar("ConfigT", bound=ExperimentConfig)


@dataclass(frozen=True)
class TrainArguments(Generic[ConfigT]):
    config: ConfigT
    resume: bool = False
    """Go on from the newest checkpoint in --run-dir (from the start, if there is none yet), or of
    the preset's newest run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "inspect": _inspect,
        "reproduce": _reproduce,
        "info": _info,
    }
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    _keep_freed_memory()
    try:
        if words[0] not in commands:
            raise UsageError(f"unknown command {words[0]!r}; expected {', '.join(commands)}")
        return commands[words[0]](words[1:])
    except KeyboardInterrupt:
        print("mann-ext: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        silence_output()
        return 141
    except Exception as error:
        if not _expected(error):
            raise
        message = str(error)
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        print(f"mann-ext: {message}", file=sys.stderr)
        return 2


def _keep_freed_memory() -> None:
    """Let glibc keep what one minibatch frees for the next: fresh pages for them take up to a tenth
    of a training step. Blocks of more than 1 GiB still go back."""
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    library = ctypes.CDLL(None) if sys.platform == "linux" else object()
    mallopt = getattr(library, "mallopt", None)  # glibc has it
    if mallopt is not None:
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def _expected(error: Exception) -> bool:
    """Whether the message alone tells the user what to do, so that a traceback would only hide it.

    The classes are found by name: importing their modules here would import torch.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(
        names & {"UsageError", "ConfigError", "CheckpointError", "TrainingError", "DataError"}
    )


def _train(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print("usage: mann-ext train PRESET [--FIELD VALUE ...] [--resume]\n\npresets:")
        for name, (_, description) in PRESETS.items():
            print(f"  {name:<35}{description}")
        print("\nmann-ext train PRESET --help lists the fields and the preset's values.")
        return 0 if words else 2
    name, *words = words
    config, resume = _parse_train(words, name, preset(name))

    from mann_ext.training import load_config, run_folder, train

    if resume:
        # The run's own configuration is where the command line's changes start from.
        run_dir = run_folder(config.run, name, resume)
        if (run_dir / "config.json").is_file():
            saved, trained = load_config(run_dir)
            if trained != name:
                raise UsageError(f"{run_dir} is a run of preset {trained}, not of {name}")
            saved = dataclasses.replace(saved, run=dataclasses.replace(saved.run, run_dir=run_dir))
            config, _ = _parse_train(words, name, saved)
    outcome = train(config, name, resume=resume)
    return 0 if outcome.signal is None else 128 + outcome.signal


def _parse_train(words: list[str], name: str, default: ConfigT) -> tuple[ConfigT, bool]:
    tyro = _tyro()
    parsed = tyro.cli(
        TrainArguments[type(default)],  # type: ignore[misc]
        args=words,
        prog=f"mann-ext train {name}",
        description=f"{PRESETS[name][1]}. Every field can be changed.",
        default=TrainArguments(default),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return parsed.config, parsed.resume


def _eval(words: list[str]) -> int:
    tyro = _tyro()
    if words and words[0] not in ("-h", "--help"):
        path, words = Path(words[0]), words[1:]
    elif words:
        print(f"usage: mann-ext eval RUN [--FIELD VALUE ...]\n\n{RUN}")
    else:
        raise UsageError("eval: expected a run's folder, a checkpoint or a pretrained model")
    options = tyro.cli(
        EvalOptions, args=words, prog="mann-ext eval RUN", description=EvalOptions.__doc__
    )
    from mann_ext.training import evaluate_run

    evaluate_run(path, options)
    return 0


def _reproduce(words: list[str]) -> int:
    from mann_ext.reproduce import listing, reproduce, reproduction, write_readme

    if not words or words[0] in ("-h", "--help", "--list"):
        print(REPRODUCE_USAGE if words != ["--list"] else listing())
        return 0 if words else 2
    if words[0] == "--readme":
        if len(words) != 2:
            raise UsageError("reproduce --readme: expected one Markdown file")
        write_readme(Path(words[1]))
        return 0
    name, *words = words
    entry = reproduction(name)
    options = _tyro().cli(
        ReproduceOptions,
        args=words,
        prog=f"mann-ext reproduce {name}",
        description=f"{entry.description}. {ReproduceOptions.__doc__}",
    )
    stopped_by = reproduce(entry, options)
    return 0 if stopped_by is None else 128 + stopped_by


def _inspect(words: list[str]) -> int:
    tyro = _tyro()
    if not words:
        raise UsageError("inspect: expected a run's folder, a checkpoint or a pretrained model")
    if words[0] in ("-h", "--help"):
        print(f"usage: mann-ext inspect RUN [--FIELD VALUE ...]\n\n{RUN}")
    else:
        path, words = Path(words[0]), words[1:]
    options = tyro.cli(
        InspectOptions, args=words, prog="mann-ext inspect RUN", description=InspectOptions.__doc__
    )
    from mann_ext.inspection import inspect_run

    inspect_run(path, options)
    return 0


def _info(words: list[str]) -> int:
    if words:
        print("usage: mann-ext info\n\nPrint what a bug report needs.")
        return 0 if words[0] in ("-h", "--help") else 2
    from mann_ext.info import format_info

    print(format_info())
    return 0


def _tyro() -> Any:
    try:
        import tyro
    except ImportError:
        raise UsageError("the command line needs tyro: pip install 'mann_ext[train]'") from None
    return tyro


if __name__ == "__main__":
    sys.exit(main())
