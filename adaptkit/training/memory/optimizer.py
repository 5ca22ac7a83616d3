"""AdamW over one flat vector of parameters, its state in pages."""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptkit.numerics.adamw import STATE_BITS, AdamW
from adaptkit.training.config import TrainConfig
from adaptkit.training.memory.moments import PagedState, page_elements
from adaptkit.training.memory.parameters import Group, Trainable
from adaptkit.training.shortage import is_out_of_memory

PAGE_KIB = {"cpu": 2048, "cuda": 8192}
"""Size of a page, by the kind of device: on a GPU a page costs the host some launches, whatever its size, a tenth of a
millisecond; to copy it should take longer than that, or the bus waits for the host."""


class PagedAdamW:
    """AdamW; see ``numerics.adamw`` for its arithmetic.

    Args:
        parameters: (N,) float32; updated in place.
        gradients: (N,) float32; read.
        groups: cover them, in order; say what the learning rate is multiplied by, and whether weights decay.
        state: the moments of N parameters.
        weight_decay: decoupled from the gradient.
    """

    def __init__(
        self,
        parameters: Tensor,
        gradients: Tensor,
        groups: Sequence[Group],
        state: PagedState,
        weight_decay: float = 0.0,
    ) -> None:
        self._parameters, self._gradients, self._groups = parameters, gradients, groups
        self.state, self._weight_decay = state, weight_decay
        self.steps = 0

    def clip(self, max_norm: float) -> float:
        """Scale the gradients down to a norm, and return the norm that they had; 0 leaves them as they are."""
        norm = torch.linalg.vector_norm(self._gradients)
        found = float(norm)
        if 0 < max_norm < found + 1e-6:  # otherwise the factor is 1
            self._gradients.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return found

    @torch.no_grad()
    def step(self, learning_rate: float) -> dict[str, Any]:
        """Update all parameters, page by page.

        Returns:
            The page table, and what moved in this step, under ``paging``; nothing if everything is resident.
        """
        self.steps += 1
        before = self.state.pages.metrics()
        rules = [
            AdamW(learning_rate * group.rate, self.steps, self._weight_decay if group.decay else 0.0)
            for group in self._groups
        ]
        waiting: list[tuple[list[Tensor], ...]] = [([], [], [], []) for _ in rules]
        for page, (span, first, second) in enumerate(self.state.sweep()):
            for group, vectors in zip(self._groups, waiting, strict=True):
                part = slice(max(span.start, group.span.start), min(span.stop, group.span.stop))
                if part.start < part.stop:
                    inside = slice(part.start - span.start, part.stop - span.start)
                    found = self._parameters[part], self._gradients[part], first[inside], second[inside]
                    for vector, piece in zip(vectors, found, strict=True):
                        vector.append(piece)
            if page + 1 == self.state.pages.count or not self.state.stays(page):
                for rule, vectors in zip(rules, waiting, strict=True):
                    rule.update(*vectors)
                    for vector in vectors:
                        vector.clear()
        after = self.state.pages.metrics()
        moved = {name: after[name] - before[name] for name in ("faults", "write_backs")}
        return {"paging": after | moved} if after["resident"] < after["pages"] else {}


def make_optimizer(trainable: Trainable, config: TrainConfig, file: Path, note: Callable[[str], None]) -> PagedAdamW:
    """The optimizer of a run. Pages that the device has no room for are not resident, whatever was asked for.

    Args:
        trainable: what it changes, on its device.
        config: says how large pages are and how many may be resident.
        file: backs the pages that are not resident, on a CPU.
        note: told, in a line for people, if there is no room.

    Raises:
        RuntimeError: there is no room for a page either.
    """
    bits = STATE_BITS[config.optimizer]
    page_kib = config.page_kib or PAGE_KIB[trainable.values.device.type]
    budget = None if config.optimizer_pages_mib is None else int(config.optimizer_pages_mib * 2**20)
    values, elements = trainable.values, page_elements(page_kib * 1024, bits)
    make = partial(PagedState, values.numel(), elements, device=values.device, file=file, bits=bits)
    try:
        state = make(budget)
    except RuntimeError as error:
        needs_one_page = values.numel() <= elements or (budget is not None and budget <= page_kib * 1024)
        if needs_one_page or not is_out_of_memory(error):
            raise
        state = None
    if state is None:  # only here, where nothing refers to the pages that were made, is their memory free
        gc.collect()
        state = make(0)
        note("warning: out of memory beside the base; optimizer state is kept in host memory")
    return PagedAdamW(values, trainable.gradients, trainable.groups, state, config.weight_decay)
