"""What samplers of few-shot data share: their random numbers, and drawing classes and images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["ClassSampler"]


class ClassSampler:
    """Draws classes and images of them from random numbers of its own.

    It can be pickled, and goes on bit for bit from its ``state_dict()``.

    Args:
        class_of: the class of each image (M,), any integers.
        seed: of the random numbers.
        device: where the random numbers are drawn.
    """

    def __init__(self, class_of: Tensor, seed: int, device: torch.device | str) -> None:
        numbers, counts = class_of.unique(return_counts=True)  # sorted
        self.device = torch.device(device)
        self._numbers, self._counts = numbers.to(self.device), counts.to(self.device)
        self._starts = self._counts.cumsum(0) - self._counts  # of the images sorted by class
        self._most, self._fewest = int(counts.max()), int(counts.min())
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """All that the coming batches depend on beside the arguments."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, bit for bit, where the sampler that gave ``state`` was.

        Raises:
            ValueError: ``state`` is not from a sampler on the same kind of device; this sampler
                is as it was.
        """
        generator = state.get("generator")
        try:
            if not isinstance(generator, Tensor) or generator.dtype != torch.uint8:
                raise ValueError("it has no state of random numbers")
            self._check_state(state)
            self._generator.set_state(generator.cpu())
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{type(self).__name__}: expected the state_dict() of a sampler on a "
                f"{self.device.type} device; this one cannot be used ({error})"
            ) from error

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError where something else is missing in ``state``."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator(state["device"])
        generator.set_state(state["_generator"])
        self.__dict__.update(state, _generator=generator)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self.device)

    def _integers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self._generator, device=self.device)

    def _choose(self, batch: int, ways: int) -> Tensor:
        """Different classes for each of ``batch`` tasks, by their place in ``_numbers`` (B, N)."""
        return self._uniform(batch, len(self._numbers)).topk(ways).indices

    def _orders(self, chosen: Tensor, needed: int) -> Tensor:
        """A random order of the images of each class (B, N), (B, N, those that may be needed)."""
        ranks = self._uniform(*chosen.shape, self._most)
        if self._fewest < self._most:  # images that a class has not got come last
            missing = torch.arange(self._most, device=self.device) >= self._counts[chosen, None]
            ranks.masked_fill_(missing, 2)
        if self._most > needed:
            return ranks.topk(needed, largest=False).indices
        return ranks.argsort(-1)
