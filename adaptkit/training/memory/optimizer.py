"""AdamW over one flat vector of parameters, with paged state."""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptkit.training.config import TrainConfig
from adaptkit.training.memory.adamw import STATE_BITS, AdamW
from adaptkit.training.memory.moments import PagedState, bytes_of_page, page_elements
from adaptkit.training.memory.paging import slots_within
from adaptkit.training.memory.parameters import Group, Trainable
from adaptkit.training.out_of_memory import is_out_of_memory

PAGE_KIB = {"cpu": 2048, "cuda": 8192}
"""Page size by device type. On a GPU a page costs the host a few launches (a tenth of a millisecond) regardless of its
size; copying a page should take longer than that, or the bus idles while the host launches."""
_ROW = 4096


class PagedAdamW:
    """AdamW; see ``training.memory.adamw`` for its arithmetic.

    Args:
        parameters: (N,) float32; updated in place.
        gradients: (N,) float32; only ``clip`` changes them.
        groups: parameter groups, which cover the vector in order.
        state: moments of the N parameters.
        weight_decay: decoupled weight decay, for groups that decay.
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
        """Clip the gradients to a total norm, and return their norm before clipping; ``max_norm`` 0: do not clip."""
        norm = _norm(self._gradients)
        found = float(norm)
        if 0 < max_norm < found + 1e-6:  # otherwise the factor is 1
            self._gradients.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return found

    @torch.no_grad()
    def step(self, learning_rate: float) -> dict[str, Any]:
        """Update all parameters, page by page.

        Returns:
            Under ``paging`` the metrics of ``Pages``, with faults and write-backs of this step only; empty if all pages
            are resident.
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


def _norm(vector: Tensor) -> Tensor:
    """Return the norm of the norms of pieces.

    On a CPU, ``vector_norm`` adds all squares of a vector into a few float32 sums. Of 135 million, it loses 1.4 %.
    """
    end = vector.numel() // _ROW * _ROW
    norms = torch.linalg.vector_norm(vector[:end].view(-1, _ROW), dim=1)
    last = torch.linalg.vector_norm(vector[end:]).view(1)
    norm: Tensor = torch.linalg.vector_norm(torch.cat([norms, last]))
    return norm


def state_bytes(trainable: Trainable, config: TrainConfig) -> int:
    """Return the bytes of state that ``make_optimizer`` will keep on the device."""
    bits = STATE_BITS[config.optimizer]
    elements = page_elements(_page_kib(config, trainable.values.device) * 1024, bits)
    size = bytes_of_page(elements, bits)
    return size * slots_within(_budget(config), -(-trainable.values.numel() // elements), size)


def _budget(config: TrainConfig) -> int | None:
    return None if config.optimizer_pages_mib is None else int(config.optimizer_pages_mib * 2**20)


def _page_kib(config: TrainConfig, device: torch.device) -> int:
    return config.page_kib or PAGE_KIB[device.type]


def make_optimizer(trainable: Trainable, config: TrainConfig, file: Path, note: Callable[[str], None]) -> PagedAdamW:
    """Create a run's optimizer. If allocating the resident pages runs out of memory, all state is kept on the host.

    Args:
        trainable: parameters and gradients, on the training device.
        config: options of the run, with page size and budget.
        file: backs the pages that are not resident, on a CPU.
        note: called with a one-line message if the device is out of memory.

    Raises:
        RuntimeError: out of memory even with a single page on the device.
    """
    values, bits, budget = trainable.values, STATE_BITS[config.optimizer], _budget(config)
    page_kib = _page_kib(config, values.device)
    elements = page_elements(page_kib * 1024, bits)
    make = partial(PagedState, values.numel(), elements, device=values.device, file=file, bits=bits)
    try:
        state = make(budget)
    except RuntimeError as error:
        needs_one_page = values.numel() <= elements or (budget is not None and budget <= page_kib * 1024)
        if needs_one_page or not is_out_of_memory(error):
            raise
        state = None
    if state is None:  # outside the except block: its traceback keeps the already allocated pages alive
        gc.collect()
        state = make(0)
        note("warning: out of memory beside the base; optimizer state is kept in host memory")
    return PagedAdamW(values, trainable.gradients, trainable.groups, state, config.weight_decay)
