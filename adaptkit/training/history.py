"""What a run measured, line by line; the same run gives the same bytes, so nothing in it depends on the clock.

metrics.jsonl    {"step": 3, "loss": …, "learning_rate": …, …}     a step
                 {"step": 3, "held_out_loss": …}                   a measurement

Lines are in the order of the steps.
"""

import json
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.writer import disk_errors

METRICS_NAME = "metrics.jsonl"


class History:
    """The lines so far, also in a file that can be followed while the run goes on.

    Args:
        folder: of the file; None keeps none.
        content: the lines with which to begin.
    """

    def __init__(self, folder: Path | None, content: bytes = b"") -> None:
        self._path = None if folder is None else folder / METRICS_NAME
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in content.splitlines()]
        if self._path is not None:
            with disk_errors(self._path):
                self._path.write_bytes(self.content())

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self.lines.append(line)
        if self._path is not None:
            with disk_errors(self._path), self._path.open("ab") as file:
                file.write(_encode(line))

    def content(self) -> bytes:
        """One JSON object a line."""
        return b"".join(map(_encode, self.lines))

    def values(self, name: str) -> list[Any]:
        """What was measured under a name so far, in order."""
        return [line[name] for line in self.lines if name in line]


def _encode(line: dict[str, Any]) -> bytes:
    return (json.dumps(line) + "\n").encode()
