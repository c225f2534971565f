"""One process of a run: alone, or one of several that ``torchrun`` started.

Gradients are averaged over the processes by ``DistributedDataParallel``, so N processes with
minibatches of B train as one with minibatches of N B at the same learning rate.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process's place among those of the run."""

    rank: int = 0
    local_rank: int = 0
    count: int = 1
    local_count: int = 1
    control: Any = None
    """Group for small messages between the processes, on the CPU whatever the device."""

    @property
    def first(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """The first process's value of a small object, in every process."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over the processes, so that all take the same decision."""
        if self.count == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return shared.tolist()


def join(device_type: str) -> Processes:
    """Join the processes that ``torchrun`` started, if it started this one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return Processes(
        rank=dist.get_rank(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        count=count,
        local_count=int(os.environ.get("LOCAL_WORLD_SIZE", str(count))),
        control=dist.new_group(backend="gloo"),
    )


def leave(processes: Processes) -> None:
    """Undo `join`."""
    if processes.count > 1:
        dist.destroy_process_group()
