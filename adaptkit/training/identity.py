"""What determines the result of a run, recorded in its unfinished output and compared before it is resumed.

run.json    options, base and data by hash; a base without a manifest by its files' sizes and times, and by its contents
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.layout import read_json, write_json
from adaptkit.checkpoint.writer import replace_file
from adaptkit.errors import CheckpointError, UsageError
from adaptkit.training.distributed import World

RUN_NAME = "run.json"
_CONTENTS = "base_contents"  # beside the keys of the identity
Contents = Callable[[], str | None]
"""Returns the hash of a base that has no manifest, which takes as long as reading it."""


def record_identity(folder: Path, identity: Mapping[str, Any], contents: Contents) -> None:
    """Record what determines the result, so that a run that cannot resume can say why."""
    if read_identity(folder) is None:
        replace_file(folder / RUN_NAME, write_json({**identity, _CONTENTS: contents()}))


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Return the recorded identity of the run in a folder; None if there is none that can be read."""
    try:
        return read_json(folder / RUN_NAME)
    except (CheckpointError, OSError):
        return None


def as_recorded(folder: Path, identity: Mapping[str, Any], contents: Contents) -> Mapping[str, Any]:
    """Return an identity, with the recorded times of its base's files if only these changed, as in a copy.

    Args:
        folder: partial folder of the output.
        identity: identity of this run.
        contents: called only if times differ.
    """
    known = read_identity(folder) or {}
    before, base = known.get("base"), json.loads(write_json(identity))["base"]
    is_alike = before != base and _without_times(before) == _without_times(base)
    return {**identity, "base": before} if is_alike and known.get(_CONTENTS) == contents() else identity


def changes(known: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Return what differs from a recorded identity, as phrases."""
    return _differences(known, json.loads(write_json(identity)))


def check_same_inputs(world: World, identity: Mapping[str, Any]) -> None:
    """Refuse processes with different inputs: the sum of their gradients would be meaningless.

    Each process reads its own files and options, perhaps on another machine.

    Raises:
        UsageError: in every process; names what differs.
    """
    mine = {**identity, "base": _without_times(identity["base"])}  # which differ between machines
    differences = _differences(world.broadcast_object(mine), mine, "{} is {} there and {} here")
    reports = [f"process {world.rank} differs from the first: {'; '.join(differences)}"] if differences else []
    reports = world.gather(reports)
    if reports:
        raise UsageError(". ".join(reports), hint="start all processes with the same options, base and data")


def _without_times(base: Any) -> Any:
    """Return the files and sizes of a base without a manifest; the hash of one that has it."""
    return [entry[:2] for entry in base] if isinstance(base, list) else base


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], said: str = "{} was {} and is {}") -> list[str]:
    """Return what differs, as phrases: options by name with both values, anything else by name."""
    options = before.get("options") or {}
    others = {"base": "base", "data": "data", "init": "adapter to start from", "chat_template": "chat template"}
    found = [
        said.format(name, *(_shown(run.get(name)) for run in (options, now["options"])))
        for name in sorted({*options, *now["options"]})
        if options.get(name) != now["options"].get(name)
    ]
    return found + [f"another {what}" for key, what in others.items() if before.get(key) != now.get(key)]


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
