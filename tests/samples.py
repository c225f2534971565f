"""Sample inputs of every operator, typical, at the edges and extreme: all tests run over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mann_ext import reference


@dataclass(frozen=True)
class Sample:
    """Arguments of one call. ``differentiable`` ones can be checked against a gradient."""

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    extreme: bool = False  # values whose derivative has no use, or none

    def to(self, dtype: torch.dtype) -> Sample:
        """The same with the memory in ``dtype`` and all else in its accumulation dtype."""
        acc = reference.accumulation_dtype(dtype)
        converted = tuple(
            x if x is None or x.dtype == torch.bool else x.to(dtype if i in self._stored() else acc)
            for i, x in enumerate(self.args)
        )
        return Sample(self.name, converted, self.options, self.extreme)

    def _stored(self) -> tuple[int, ...]:
        return {8: (0,), 15: (4,)}.get(len(self.args), (1, 2))  # the memory; keys and values


def _lrua_sample(
    name: str,
    steps: int = 5,
    batch: int = 2,
    slots: int = 20,
    width: int = 6,
    heads: int = 2,
    *,
    strength: float | None = 2.0,
    contents: bool = False,
    reset: bool = False,
    constant: bool = False,
    scale: float = 1.0,
    change: Callable[[list[Any]], None] | None = None,
    extreme: bool = False,
    seed: int = 0,
    **options: Any,
) -> Sample:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if constant:
        memory, read_weights, usage = reference.fresh_state(
            batch, heads, slots, width, 1e-6, torch.float64, torch.device("cpu")
        )
    else:
        memory = normal(batch, slots, width) * scale
        read_weights = normal(batch, heads, slots).softmax(-1)
        usage = torch.rand(batch, slots, generator=generator, dtype=torch.float64)
    args: list[Any] = [
        memory,
        read_weights,
        usage,
        normal(steps, batch, heads, width) * scale,
        normal(steps, batch, heads).sigmoid(),
        None if strength is None else strength * normal(steps, batch, heads).exp(),
        normal(steps, batch, heads, width) * scale if contents else None,
        torch.rand(steps, batch, generator=generator) < 0.3 if reset else None,
    ]
    if change is not None:
        change(args)
    return Sample(name, tuple(args), options, extreme)


def _zero_rows(args: list[Any]) -> None:
    args[0][:, ::2] = 0
    args[3][1:3] = 0


def _non_contiguous(args: list[Any]) -> None:
    args[0] = args[0].transpose(1, 2).contiguous().transpose(1, 2)
    for i in (3, 4):
        args[i] = args[i].transpose(0, 1).contiguous().transpose(0, 1)


def lrua_samples(seed: int = 0) -> list[Sample]:
    """Arguments (memory, read_weights, usage, keys, gates, strengths, contents, reset), float64."""
    _lrua = partial(_lrua_sample, seed=seed)
    return [
        _lrua("typical"),
        _lrua("paper", 6, 2, 128, 40, 4, strength=None),
        _lrua("shared", contents=True, least_used="shared"),
        _lrua("contents", contents=True),
        _lrua("episode_start", 8, constant=True),
        _lrua("reset", 9, 3, reset=True, contents=True),
        _lrua("reset_shared", 9, 3, heads=3, reset=True, least_used="shared"),
        _lrua("one_slot", slots=1, heads=1),
        _lrua("one_head_width_one", heads=1, width=1),
        _lrua("slots_equal_heads", slots=3, heads=3),
        _lrua("more_heads_than_slots", slots=3, heads=5),
        _lrua("tile_exact", slots=64, width=3),
        _lrua("tile_and_one", slots=65, width=17, heads=3),
        _lrua("eight_heads", slots=70, heads=8),
        _lrua("seven_heads_wide", slots=33, width=129, heads=7),
        _lrua("several_blocks", 3, 1, 2500, 8, 4),
        _lrua("one_step", 1),
        _lrua("no_steps", 0),
        _lrua("no_batch", batch=0),
        _lrua("non_contiguous", change=_non_contiguous),
        _lrua("zero_rows_and_keys", change=_zero_rows, extreme=True),
        _lrua("sharp", strength=60.0, extreme=True),
        _lrua("huge", scale=1e12, extreme=True),
        _lrua("tiny", scale=1e-12, extreme=True),
    ]


def _ntm_sample(
    name: str,
    steps: int = 5,
    batch: int = 2,
    slots: int = 20,
    width: int = 6,
    reads: int = 2,
    writes: int = 1,
    *,
    strength: float = 2.0,
    sharpening: float = 1.0,
    reset: bool = False,
    constant: bool = False,
    scale: float = 1.0,
    change: Callable[[list[Any]], None] | None = None,
    extreme: bool = False,
    seed: int = 0,
) -> Sample:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * seed)
    heads = reads + writes

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if constant:
        memory, weights, _ = reference.fresh_state(
            batch, heads, slots, width, 1e-6, torch.float64, torch.device("cpu")
        )
    else:
        memory = normal(batch, slots, width) * scale
        weights = normal(batch, heads, slots).softmax(-1)
    args: list[Any] = [
        memory,
        weights,
        normal(steps, batch, heads, width) * scale,
        strength * normal(steps, batch, heads).exp(),
        normal(steps, batch, heads).sigmoid(),
        normal(steps, batch, heads, 3).softmax(-1),
        1 + sharpening * normal(steps, batch, heads).exp(),
        normal(steps, batch, writes, width).sigmoid(),
        normal(steps, batch, writes, width) * scale,
        torch.rand(steps, batch, generator=generator) < 0.3 if reset else None,
    ]
    if change is not None:
        change(args)
    return Sample(name, tuple(args), {}, extreme)


def _ntm_zero_rows(args: list[Any]) -> None:
    args[0][:, ::2] = 0
    args[2][1:3] = 0
    args[7][2:] = 1  # erases all of what the write head is at


def _ntm_non_contiguous(args: list[Any]) -> None:
    args[0] = args[0].transpose(1, 2).contiguous().transpose(1, 2)
    for i in range(2, 9):
        args[i] = args[i].transpose(0, 1).contiguous().transpose(0, 1)


def ntm_samples(seed: int = 0) -> list[Sample]:
    """Arguments (memory, weights, keys, strengths, gates, shifts, sharpenings, erases, adds,
    reset), float64."""
    _ntm = partial(_ntm_sample, seed=seed)
    return [
        _ntm("typical"),
        _ntm("paper", 6, 2, 128, 40, 4),
        _ntm("episode_start", 8, constant=True),
        _ntm("reset", 9, 3, reset=True),
        _ntm("several_write_heads", 7, writes=3, reset=True),
        _ntm("one_slot", slots=1, reads=1),
        _ntm("two_slots", slots=2),
        _ntm("one_read_width_one", reads=1, width=1),
        _ntm("tile_exact", slots=64, width=3),
        _ntm("tile_and_one", slots=65, width=17, reads=3, writes=2),
        _ntm("seven_reads_wide", 3, slots=33, width=129, reads=7),
        _ntm("several_blocks", 3, 1, 2500, 8, 4),
        _ntm("one_step", 1),
        _ntm("no_steps", 0),
        _ntm("no_batch", batch=0),
        _ntm("non_contiguous", change=_ntm_non_contiguous),
        _ntm("sharpened", sharpening=20.0, extreme=True),
        _ntm("strong", strength=300.0, extreme=True),
        _ntm("zero_rows_and_keys", change=_ntm_zero_rows, extreme=True),
        _ntm("huge", scale=1e12, extreme=True),
        _ntm("tiny", scale=1e-12, extreme=True),
    ]


def _lstm_lrua_sample(
    name: str,
    steps: int = 5,
    batch: int = 2,
    slots: int = 20,
    width: int = 6,
    heads: int = 2,
    inputs: int = 4,
    hidden: int = 7,
    *,
    strength: float | None = 2.0,
    reset: bool = False,
    constant: bool = False,
    seed: int = 0,
    **options: Any,
) -> Sample:
    # The memory and its state are as for lrua_scan; the weights as in trained networks.
    memory, read_weights, usage, *_, chosen = _lrua_sample(
        name, steps, batch, slots, width, heads, reset=reset, constant=constant, seed=seed
    ).args
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * seed + 1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return normal(rows, columns) * columns**-0.5

    per_step = options.get("strength_per_step", False)
    numbers = heads * width * (2 if options.get("write_content") else 1)
    numbers += heads * (2 if per_step else 1)
    args = (
        normal(steps, batch, inputs),
        normal(batch, hidden),
        normal(batch, hidden),
        normal(batch, heads, width),
        memory,
        read_weights,
        usage,
        weight(4 * hidden, inputs + heads * width),
        weight(4 * hidden, hidden),
        normal(4 * hidden),
        normal(4 * hidden),
        2 * weight(numbers, hidden),
        normal(numbers),
        None if strength is None or per_step else strength * normal(heads).exp(),
        chosen,
    )
    return Sample(name, args, options)


def lstm_lrua_samples(seed: int = 0) -> list[Sample]:
    """Arguments of lstm_lrua_scan in its order, float64."""
    _cell = partial(_lstm_lrua_sample, seed=seed)
    every: dict[str, Any] = {
        "key_activation": "tanh", "write_content": True, "strength_per_step": True
    }  # fmt: skip
    return [
        _cell("typical"),
        _cell("paper", 4, 2, 128, 40, 4, 70, 50, strength=None),
        _cell("tanh", key_activation="tanh"),
        _cell("contents", write_content=True),
        _cell("strength_per_step", strength_per_step=True),
        _cell("everything", 6, 3, least_used="shared", reset=True, **every),
        _cell("shared", heads=3, least_used="shared"),
        _cell("episode_start", 8, constant=True),
        _cell("reset", 9, 3, reset=True),
        _cell("one_of_each", 3, 1, 1, 1, 1, 1, 1),
        _cell("one_head_width_one", heads=1, width=1, reset=True),
        _cell("more_heads_than_slots", slots=3, heads=5),
        _cell("odd_sizes", 4, 19, 65, 9, 3, 5, 17, **every),
        _cell("eight_heads", slots=70, heads=8),
        _cell("several_blocks", 3, 1, 2500, 8, 4, 30, 40),
        _cell("one_step", 1, reset=True),
        _cell("no_steps", 0),
        _cell("no_batch", batch=0),
    ]


def deferred_lrua_samples() -> list[Sample]:
    """What deferred writes can get wrong: resets and rows erased twice within a chunk."""
    return [
        _lrua_sample("resets_in_mid_chunk", 11, 3, 70, 8, 2, reset=True),
        _lrua_sample("resets_and_contents", 11, 3, 70, 7, 6, reset=True, contents=True),
        _lrua_sample("slots_erased_twice", 9, 2, 7, 5, 3, contents=True),
        _lrua_sample("erased_twice_by_many", 9, 2, 11, 6, 5, least_used="shared"),
        _lrua_sample("more_heads_than_slots_for_long", 7, 2, 3, 9, 5, contents=True),
        _lrua_sample("sharp_and_deferred", 7, 2, 300, 8, 2, strength=300.0),
        _lrua_sample("sharp_and_deferred_many", 5, 1, 300, 8, 6, strength=300.0, reset=True),
    ]


def content_samples() -> list[Sample]:
    """Arguments (queries, keys, values, strengths, mask), float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def mask(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) < 0.6

    nothing = mask(2, 3, 5)
    nothing[0, 1] = False
    return [
        Sample("typical", (normal(2, 3, 4), normal(2, 5, 4), None, None, None)),
        Sample("values", (normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 7), None, None)),
        Sample("dot", (normal(2, 3, 4), normal(2, 5, 4), None, None, None), {"similarity": "dot"}),
        Sample("strengths", (normal(2, 3, 4), normal(2, 70, 4), None, normal(2, 3).exp(), None)),
        Sample("mask_shared", (normal(2, 3, 4), normal(2, 5, 4), None, None, mask(2, 5))),
        Sample("mask_empty", (normal(2, 3, 4), normal(2, 5, 4), None, None, nothing)),
        Sample("one", (normal(1, 1, 1), normal(1, 1, 1), normal(1, 1, 1), None, None)),
        Sample("unbatched", (normal(3, 4), normal(5, 4), None, None, None)),
        Sample("shared_keys", (normal(2, 3, 4), normal(1, 5, 4), normal(1, 5, 2), None, None)),
        Sample("blocks", (normal(1, 5, 7), normal(1, 1100, 7), normal(1, 1100, 33), None, None)),
        Sample("no_queries", (normal(2, 0, 4), normal(2, 5, 4), None, None, None)),
    ]
