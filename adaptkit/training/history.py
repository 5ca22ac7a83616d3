"""Metrics of a run, one JSON object per line; the same run gives the same bytes, so nothing depends on the clock.

metrics.jsonl    {"step": 3, "loss": …, "learning_rate": …, …}     a step
                 {"step": 3, "held_out_loss": …}                   a measurement

Lines are in step order. A run may have millions of them, so values that every step needs are updated incrementally.
"""

import json
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.layout import METRICS_NAME
from adaptkit.checkpoint.writer import disk_errors


class History:
    """The lines so far, also written to a file that can be followed during the run.

    Args:
        folder: folder of the file; None writes no file.
        content: the lines to start with.

    Attributes:
        held_out: maps a step to the held-out loss that was measured after it.
        best_step: step after which the loss was lowest, the first of equals; None if it was not measured. Step 0 does
            not count: nobody wants the untrained adapter.
        since_best: number of measurements after that one.
        skipped_in_a_row: number of skipped steps at the end.
    """

    def __init__(self, folder: Path | None, content: bytes) -> None:
        self._path = None if folder is None else folder / METRICS_NAME
        self._content = bytearray(content)
        self._newest: tuple[int, set[str]] = (0, set())
        self.held_out: dict[int, float] = {}
        self.best_step: int | None = None
        self.since_best = self.skipped_in_a_row = 0
        for line in self.lines():
            self._count(line)
        if self._path is not None:
            with disk_errors(self._path):
                self._path.write_bytes(self._content)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line, also to the file."""
        encoded = (json.dumps(line) + "\n").encode()
        self._content += encoded
        self._count(line)
        if self._path is not None:
            with disk_errors(self._path), self._path.open("ab") as file:
                file.write(encoded)

    def lines(self) -> list[dict[str, Any]]:
        """Return all lines, parsed again on every call."""
        return [json.loads(line) for line in self._content.splitlines()]

    def content(self) -> bytes:
        """Return all lines as bytes, one JSON object per line."""
        return bytes(self._content)

    def known(self, step: int) -> set[str]:
        """Return the names of what was measured after a step; only for the newest step or a later one."""
        return self._newest[1] if self._newest[0] == step else set()

    def _count(self, line: dict[str, Any]) -> None:
        step = line["step"]
        self._newest = step, self.known(step) | set(line)
        if "tokens" in line:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if "skipped" in line else 0
        if "held_out_loss" not in line:
            return
        self.held_out[step] = line["held_out_loss"]
        if step > 0:
            is_better = self.best_step is None or line["held_out_loss"] < self.held_out[self.best_step]
            self.best_step, self.since_best = (step, 0) if is_better else (self.best_step, self.since_best + 1)
