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
        return (0,) if len(self.args) == 8 else (1, 2)  # the memory; keys and values


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
