"""``python -m benchmarks NAME [--json FILE]``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks import measure


def main(
    name: Annotated[Literal["lrua", "ntm", "metanet", "drift", "scaling"], tyro.conf.Positional],
    json: Path | None = None,
    repeats: int = 15,
    compile_steps: int = 0,
    large: bool = True,
    threads: int = 1,
) -> None:
    """Run a benchmark and print a table.

    Args:
        name: lrua (speed and memory against opponents and floors), ntm (speed against the
            reference and eager PyTorch), metanet (a training step against a loop over examples),
            drift (exactness of rollback) or scaling (time and memory by number of slots; --json
            also draws a figure beside it).
        json: also write the results to this file.
        repeats: timed runs of each contender, after two warm-up runs.
        compile_steps: also compile the eager scan with torch.compile at this length (minutes).
        large: also run the rows of large memories.
        threads: CPU threads of the scaling study; another process on the same cores costs several
            threads far more than one.
    """
    if name == "drift":
        from benchmarks import drift

        rows = drift.run()
        report = {"machine": measure.machine(), "rows": rows}
        measure.print_table("Rollback", list(rows[0]), [list(row.values()) for row in rows])
    elif name == "ntm":
        from benchmarks import ntm

        report = ntm.run(repeats)
        ntm.show(report)
    elif name == "metanet":
        from benchmarks import metanet

        report = metanet.run(repeats)
        metanet.show(report)
    elif name == "scaling":
        from benchmarks import scaling

        report = scaling.run(threads)
        if json is not None:
            scaling.plot(report, json.with_suffix(".png"))
    else:
        from benchmarks import lrua

        report = lrua.run(repeats, compile_steps, large)
        lrua.show(report)
    if json is not None:
        measure.write_json(json, report)


if __name__ == "__main__":
    tyro.cli(main)
