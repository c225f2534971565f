"""Look inside the memory: one held-out episode of a trained model, step by step.

`trace_episode` runs it; `write_page` makes a page of it that needs nothing but a browser, and
`figures.draw_episode` the same as a picture.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from mann_ext.checkpoint import replace_file
from mann_ext.data import IMAGE_SIZE
from mann_ext.experiments.config import ConfigError
from mann_ext.experiments.few_shot import FewShot
from mann_ext.experiments.santoro import InspectOptions, SlotOrder
from mann_ext.memory import LRUAMemory, LRUAMemoryTrace
from mann_ext.models import MANN
from mann_ext.training import CONFIG, load_config, load_run

TEMPLATE = Path(__file__).with_name("inspection.html")
MOST_ROWS = 256
"""Rows that a heat map of slots has at most; more slots share rows."""
MOST_BYTES = 2_000_000
"""Bytes of all heat maps of a page; base64 makes them a third longer."""
MOST_SOURCES = 6
"""Steps whose slots the page lists at a step: those read most."""


@dataclass(frozen=True)
class TracedEpisode:
    """One episode, the model's answers, and what its memory did; step first, no batch axis.

    title: what was run, in words.
    images: (T, S, S), ink 1.
    labels, predictions: of every step, in words.
    names: the C labels of the episode, and their probabilities (T, C).
    confidence: (T,), the probability of each prediction, which may be none of ``names`` where
        labels are strings.
    instances: (T,), 1 for the first time a class is shown.
    trace: with T in front.
    """

    title: str
    images: Tensor
    labels: Sequence[str]
    predictions: Sequence[str]
    names: Sequence[str]
    probabilities: Tensor
    confidence: Tensor
    instances: Tensor
    trace: LRUAMemoryTrace

    @property
    def steps(self) -> int:
        return len(self.labels)

    @property
    def right(self) -> list[bool]:
        """Whether each prediction is the label."""
        return [a == b for a, b in zip(self.labels, self.predictions, strict=True)]

    def stored(self) -> Tensor:
        """The step whose image each slot holds, after each step, (T, N) int64: of those since the
        slot was last erased, the one that wrote there with most weight; -1: it was never erased.
        """
        written = self.trace.write_weights.sum(1)
        weight = torch.zeros_like(written[0])
        step = torch.full_like(weight, -1, dtype=torch.long)
        erased = torch.zeros_like(weight, dtype=torch.bool)
        steps = []
        for t, (new, slots) in enumerate(zip(written, self.trace.slots, strict=True)):
            # Without its erasure a slot gets crumbs of every step, in proportion to what was read.
            erased = erased.index_fill(0, slots, True)
            weight = weight.index_fill(0, slots, -1.0)
            step = torch.where(erased & (new > weight), t, step)
            weight = torch.maximum(new, weight)
            steps.append(step)
        return torch.stack(steps)

    def sources(self) -> list[list[tuple[int, float, list[int]]]]:
        """What every step read, by the step that stored it (see `stored`), most first: that step,
        its share of the read weights of all heads, and those of its slots that were read most."""
        total = self.trace.read_weights.sum(1)
        total = total / total.sum(1, keepdim=True)
        found = []
        for weights, stored in zip(total, self.stored(), strict=True):
            shares = weights.new_zeros(self.steps + 1).index_add_(0, stored + 1, weights)
            steps = shares.topk(min(MOST_SOURCES, int((shares > 0).sum()))).indices - 1
            each = []
            for step in steps.tolist():
                own = torch.where(stored == step, weights, -1.0)
                count = min(self.trace.slots.shape[-1], int((stored == step).sum()))
                slots = sorted(own.topk(count).indices.tolist())
                each.append((step, round(float(shares[step + 1]), 4), slots))
            found.append(each)
        return found


class SlotRows:
    """The rows of a heat map of slots: which slots, in what order, several a row if there are many.

    Args:
        trace: without a batch axis.
        order: "index", or "first-write": as they were first erased and written, the rest last.
        most: rows, at most.
    """

    def __init__(
        self, trace: LRUAMemoryTrace, order: SlotOrder = "index", most: int = MOST_ROWS
    ) -> None:
        steps, slots = trace.usage.shape
        self.by_first_write = order == "first-write"
        self.size = -(-slots // max(most, 1))
        """Slots a row."""
        self.count = -(-slots // self.size)
        shown = torch.arange(slots, device=trace.usage.device)
        if self.by_first_write:
            first = torch.full_like(shown, steps)
            for t in reversed(range(steps)):
                first[trace.slots[t]] = t
            shown = first.argsort(stable=True)
        rest = self.count * self.size - slots
        self._slots = torch.cat([shown, shown[-1:].expand(rest)])  # the last row is filled up

    @property
    def label(self) -> str:
        """Of the slots' axis."""
        return "slot, by first write" if self.by_first_write else "slot"

    @property
    def slots(self) -> list[int]:
        """The first slot of each row."""
        first: list[int] = self._slots[:: self.size].tolist()
        return first

    def row_of(self) -> Tensor:
        """(N,): the row of each slot."""
        rows = torch.empty(int(self._slots.max()) + 1, dtype=torch.long, device=self._slots.device)
        rows[self._slots] = torch.arange(len(self._slots), device=rows.device) // self.size
        return rows

    def weights(self, values: Tensor) -> Tensor:
        """(..., N) -> (..., rows): the largest of each row."""
        return values[..., self._slots].unflatten(-1, (self.count, self.size)).amax(-1)

    def memory(self, values: Tensor) -> Tensor:
        """(..., N, W) -> (..., rows, W): the number farthest from 0 of each row and column."""
        parts = values[..., self._slots, :].unflatten(-2, (self.count, self.size))
        return parts.gather(-2, parts.abs().argmax(-2, keepdim=True)).squeeze(-2)


def inspect_run(run: Path, options: InspectOptions) -> Path:
    """Write the page of one held-out episode and, where matplotlib is, its figure beside it.

    Args:
        run: a run's folder, one of its checkpoints, or the name of a pretrained model.
        options: which episode, and where to.

    Returns:
        The page's path.

    Raises:
        CheckpointError: there is no such run or pretrained model.
        ConfigError: the model has no memory, an option is out of range, or pillow is missing.
        DataError: the data is missing or damaged.
    """
    if options.num_slots is not None and options.num_slots < 1:
        raise ConfigError(f"num_slots: expected at least 1, got {options.num_slots}")
    if options.out is not None and options.out.suffix not in (".html", ".htm"):
        raise ConfigError(f"out: expected the name of a page, FILE.html, got {options.out}")
    task, model, name = _load(run)
    if not isinstance(model, MANN) or not isinstance(model.memory, LRUAMemory):
        kind = type(getattr(model, "memory", model)).__name__
        raise ConfigError(
            f"{run} is a model without an LRUA memory ({kind}); expected a MANN, such as the "
            "pretrained omniglot-5way"
        )
    if options.num_slots is not None:
        model.memory.num_slots = options.num_slots
    episode = trace_episode(task, model, options.episode, name)
    if (run / CONFIG).is_file():
        page = run / f"episode-{options.episode}.html"
    else:
        page = Path(f"{run.resolve().name}-episode-{options.episode}.html")
    page = options.out or page
    write_page(episode, page, options.slots)
    from mann_ext import figures

    figures.draw_episode(episode, page.with_suffix(".png"), slots=options.slots)
    return page


def trace_episode(task: FewShot, model: MANN, index: int, name: str = "model") -> TracedEpisode:
    """Run a held-out episode and note all that its memory does.

    Args:
        task: the episodes; ``index`` counts, from 0, those of the evaluation after the training.
        model: trained for the task's episodes.
        name: of the model, for the title.

    Raises:
        ConfigError: there is no episode ``index``.
    """
    count = task.held_out_count
    if not 0 <= index < count:
        raise ConfigError(
            f"episode: expected 0 to {count - 1}, the held-out episodes of the run's evaluation, "
            f"got {index}"
        )
    episodes = task.held_out_episode(index)
    model.eval()
    with torch.inference_mode():
        logits, trace = task.trace(model, episodes)
    scores = logits[:, 0].double().log_softmax(-1).cpu()
    targets = episodes.targets[:, 0].cpu()
    best = scores.argmax(-1)
    codes = targets.unique(dim=0)
    if targets.dim() == 1:
        codes = torch.arange(scores.shape[-1])  # also the labels that this episode does not show
        logs = scores
        confidence = scores.amax(-1)
    else:  # the letters of a label are scored one by one
        at = codes.T.expand(len(scores), -1, -1)
        logs = scores.gather(-1, at).sum(1)
        confidence = scores.amax(-1).sum(-1)
    return TracedEpisode(
        title=f"{name}, held-out episode {index} ({task.data_name})",
        images=episodes.inputs[:, 0, : IMAGE_SIZE**2].unflatten(-1, (IMAGE_SIZE, -1)).cpu(),
        labels=_words(targets),
        predictions=_words(best),
        names=_words(codes),
        probabilities=logs.exp(),
        confidence=confidence.exp(),
        instances=episodes.instances[:, 0].cpu(),
        trace=LRUAMemoryTrace(*(part[:, 0].cpu() for part in trace)),
    )


def write_page(episode: TracedEpisode, path: Path, slots: SlotOrder = "index") -> None:
    """Write a page of an episode that needs no network and no other file.

    Its size is bounded (about 3 MB): many slots share rows, and numbers have 8 bits.

    Raises:
        ConfigError: pillow is missing.
        OSError: the page cannot be written.
    """
    trace = episode.trace
    width, heads = trace.memory.shape[-1], trace.gates.shape[-1]
    most = MOST_BYTES // (episode.steps * (width + heads + 3))
    rows = SlotRows(trace, slots, min(most, MOST_ROWS))
    reads = rows.weights(trace.read_weights)
    largest_read = float(reads.nan_to_num().max())
    maps = [
        _map("Usage", "largest where a slot was read or written lately", rows.weights(trace.usage)),
        _map("Write weights, sum of heads", "where each step wrote",
             rows.weights(trace.write_weights.sum(1))),
        _map("Read weights, sum of heads", "where each step read",
             rows.weights(trace.read_weights.sum(1))),
    ]  # fmt: skip
    maps += [
        _map(f"Read weights, head {head}", "", reads[:, head], largest_read)
        for head in range(heads)
    ]
    memory = rows.memory(trace.memory.float())
    bound = float(memory.nan_to_num().abs().max()) or 1.0
    row_of = rows.row_of()
    values = {
        "steps": episode.steps,
        "rows": rows.count,
        "rowSize": rows.size,
        "rowLabel": rows.label,
        "rowSlots": rows.slots,
        "labels": episode.labels,
        "predictions": episode.predictions,
        "right": episode.right,
        "instances": episode.instances.tolist(),
        "names": episode.names,
        "probabilities": _rounded(episode.probabilities),
        "confidence": _rounded(episode.confidence),
        "gates": _rounded(trace.gates),
        "strengths": _rounded(trace.strengths),
        "sources": episode.sources(),
        "headSlots": trace.read_weights.argmax(-1).tolist(),
        "headWeights": _rounded(trace.read_weights.amax(-1)),
        "writtenRows": row_of[trace.slots].tolist(),
        "writtenSlots": trace.slots.tolist(),
        "maps": maps,
        "memory": {"width": width, "bound": bound, "data": _bytes(memory, -bound, bound)},
    }
    figures = [
        _FIGURE.format(number=number, kind="head" if number > 2 else "", **each)
        for number, each in enumerate(maps)
    ]
    right = sum(episode.right)
    shared = f" Every row of a map shows {rows.size} slots." if rows.size > 1 else ""
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(episode.title),
        summary=html.escape(
            f"{right} of {episode.steps} predictions are right. {trace.usage.shape[-1]} slots of "
            f"{width} numbers, {heads} read head{'s' * (heads > 1)}.{shared}"
        ),
        last=episode.steps - 1,
        images="\n".join(_list_items(episode)),
        maps="\n".join(figures[:3]),
        heads="\n".join(figures[3:]),
        # Nothing in the data can end the script element that holds it.
        data=json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )
    replace_file(path, page.encode())
    print(f"page: {path}")


_FIGURE = """\
<figure class="map {kind}">
<figcaption><b>{title}</b> <span>{note}</span></figcaption>
<canvas data-map="{number}" role="img" aria-label="Heat map over steps and slots: {title}, \
from 0 to {high:.3g}"></canvas>
</figure>"""


def _map(title: str, note: str, values: Tensor, high: float | None = None) -> dict[str, Any]:
    """A heat map (T, rows) of numbers from 0."""
    high = float(values.nan_to_num().max()) if high is None else high
    high = high or 1.0
    return {"title": title, "note": note, "high": high, "data": _bytes(values, 0.0, high)}


def _bytes(values: Tensor, low: float, high: float) -> str:
    levels = ((values.float().nan_to_num() - low) * (255 / (high - low))).round_().clamp_(0, 255)
    return base64.b64encode(levels.to(torch.uint8).contiguous().numpy().tobytes()).decode()


def _list_items(episode: TracedEpisode) -> Iterable[str]:
    """The episode's images, each a link to its step. Not tab stops: the slider reaches them all."""
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("the page needs pillow: pip install 'mann_ext[data]'") from None
    pixels = (255 * (1 - episode.images)).round().clamp(0, 255).to(torch.uint8).numpy()
    right = episode.right
    for t in range(episode.steps):
        file = io.BytesIO()
        Image.fromarray(pixels[t]).save(file, "png", optimize=True)
        source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        mark, word = ("✓", "right") if right[t] else ("✗", "wrong")
        label = html.escape(episode.labels[t])
        prediction = html.escape(episode.predictions[t])
        yield (
            f'<li class="{word}"><a href="#t={t}" tabindex="-1"><img src="{source}" width="20" '
            f'height="20" alt="Step {t}: label {label}, predicted {prediction}, {word}">'
            f'<span aria-hidden="true">{label} {mark}</span></a></li>'
        )


def _load(run: Path) -> tuple[FewShot, torch.nn.Module, str]:
    """The task, the model, and its name."""
    config, _ = load_config(run)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, device="cpu"))
    task, model, name, progress = load_run(run, config)
    if not isinstance(task, FewShot):
        raise ConfigError(f"{run} is a run of {name}; expected a MANN that classifies images")
    return task, model, f"{name} after {progress.step:,} minibatches"


def _words(labels: Tensor) -> list[str]:
    """Labels (T,) as numbers, or (T, letters) as strings of the letters from a."""
    if labels.dim() == 1:
        return [str(label) for label in labels.tolist()]
    return ["".join(chr(ord("a") + letter) for letter in letters) for letters in labels.tolist()]


def _rounded(values: Tensor) -> Any:
    """As lists for JSON, four digits after the point."""
    return (values.double().nan_to_num() * 1e4).round().div(1e4).tolist()
