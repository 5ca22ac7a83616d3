"""What a run measured, line by line; the same run gives the same bytes, so nothing in it depends on the clock.

metrics.jsonl    {"step": 3, "loss": …, "learning_rate": …, …}     a step
                 {"step": 3, "held_out_loss": …}                   a measurement

Lines are in the order of the steps. A run may have millions of them, so what every step asks is kept up to date here.
"""

import json
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.layout import METRICS_NAME
from adaptkit.checkpoint.writer import disk_errors


class History:
    """The lines so far, also in a file that can be followed while the run goes on.

    Args:
        folder: of the file; None keeps none.
        content: the lines with which to begin.

    Attributes:
        held_out: the held-out loss, by the step after which it was measured.
        best_step: after which it was lowest, the first of equals; None if it was not measured. That before the first
            step does not count: that adapter is nobody's wish.
        since_best: measurements after that one.
        skipped_in_a_row: steps at the end that were skipped.
    """

    def __init__(self, folder: Path | None, content: bytes = b"") -> None:
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
        """Append a line."""
        encoded = (json.dumps(line) + "\n").encode()
        self._content += encoded
        self._count(line)
        if self._path is not None:
            with disk_errors(self._path), self._path.open("ab") as file:
                file.write(encoded)

    def lines(self) -> list[dict[str, Any]]:
        """All of them, read anew."""
        return [json.loads(line) for line in self._content.splitlines()]

    def content(self) -> bytes:
        """One JSON object a line."""
        return bytes(self._content)

    def known(self, step: int) -> set[str]:
        """The names of what was measured after a step, the newest one or a later one."""
        return self._newest[1] if self._newest[0] == step else set()

    def _count(self, line: dict[str, Any]) -> None:
        step = line["step"]
        self._newest = step, self.known(step) | set(line)
        if "answer_tokens" in line:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if "skipped" in line else 0
        if "held_out_loss" not in line:
            return
        self.held_out[step] = line["held_out_loss"]
        if step > 0:
            is_better = self.best_step is None or line["held_out_loss"] < self.held_out[self.best_step]
            self.best_step, self.since_best = (step, 0) if is_better else (self.best_step, self.since_best + 1)
