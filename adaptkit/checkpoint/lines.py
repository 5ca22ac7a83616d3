"""A file of JSON lines that grows by one whole line at a time, whatever kill or full disk comes in between."""

import json
import os
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.layout import read_small
from adaptkit.checkpoint.writer import disk_errors, sync_folder
from adaptkit.errors import ConflictError


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line, and make sure that it is on the disk.

    Raises:
        DiskError: there is no room for it.
    """
    with disk_errors(path), path.open("a") as file:
        is_new = not file.tell()
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
        if is_new:
            sync_folder(path.parent)


def read_lines(path: Path, repair: bool) -> list[dict[str, Any]]:
    """The complete lines of a file.

    Args:
        path: of the file.
        repair: remove from it what a kill or a full disk cut off.

    Raises:
        ConflictError: a line is no JSON object.
    """
    text = read_small(path)
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text and repair:
        os.truncate(path, len(whole))
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line holds no object")
        return lines
    except (ValueError, RecursionError) as error:
        raise ConflictError(f"{path}: is damaged ({error})", hint="delete its folder to begin anew") from error
