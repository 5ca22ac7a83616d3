"""Simulate the contents of a disk after a power cut, from a record of a process's calls.

A disk guarantees only what was synced: a file's bytes by an fsync of the file, its name by an fsync of the folder. The
rest may or may not have reached the disk, so several outcomes are tried:

    strict   only what was synced; renames that were not synced did not happen
    names    all names, but each file has the bytes of its last fsync, or none
    torn     names up to a random moment, in order; unsynced bytes complete, partial, zero, or as of the last fsync
"""

import base64
import json
import os
import random
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

from disk import Call, Hook
from jobs import TEMPORARY

OUTCOMES = ("strict", "names", "torn")


@dataclass
class Node:
    """A file or a folder, with its durable and its current bytes."""

    is_folder: bool = False
    durable: bytes = b""
    now: bytes = b""


@dataclass
class Act:
    """A change of names, with the folders to be synced to make it durable, and the file that it concerns."""

    kind: str
    path: str
    target: str
    folders: set[str]
    node: Node | None = None
    lasts: bool = False


@dataclass
class Names:
    """Paths and what they name."""

    nodes: dict[str, Node] = field(default_factory=dict)

    def apply(self, act: Act) -> None:
        """Change names; changes to missing paths, or in missing folders, are lost."""
        if act.kind in ("create", "mkdir"):
            if os.path.dirname(act.path) in self.nodes and act.node is not None:
                self.nodes.setdefault(act.path, act.node)
        elif act.kind == "rename":
            moved = self._take(act.path) or ({act.path: act.node} if act.node else {})
            if moved and os.path.dirname(act.target) in self.nodes:
                self._take(act.target)
                self.nodes |= {act.target + path.removeprefix(act.path): node for path, node in moved.items()}
        else:
            self._take(act.path)

    def _take(self, path: str) -> dict[str, Node]:
        names = [name for name in self.nodes if name == path or name.startswith(path + "/")]
        return {name: self.nodes.pop(name) for name in names}


def cuts_power(log: Path, at: int | None) -> Hook:
    """Return a hook that logs calls that change the disk, and kills its process before the ``at``-th, if any."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    write, low = os.write, os.open  # the originals, not the layer's

    def hook(call: Call) -> None:
        if call.kind in ("read", "request"):
            return
        if call.before:
            if call.number == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return
        content = b""
        if call.kind == "fsync" and not os.path.isdir(call.path):
            with os.fdopen(low(call.path, os.O_RDONLY), "rb") as file:
                content = file.read()
        line = [call.kind, call.path, call.target, base64.b64encode(content).decode()]
        write(handle, (json.dumps(line) + "\n").encode())

    return hook


class Disk:
    """The disk of one trial.

    Args:
        trial: its folder; the present contents are taken as durable.
    """

    def __init__(self, trial: Path) -> None:
        self._trial = trial
        self._begin = Names({str(trial): Node(True)})
        for path in trial.rglob("*"):
            content = b"" if path.is_dir() else path.read_bytes()
            self._begin.nodes[str(path)] = Node(path.is_dir(), content, content)

    def after(self, log: Path, outcome: str, chance: random.Random) -> None:
        """Replace the folder's contents by what a power cut after the logged calls may leave."""
        acts, live = self._read(log)
        for path, node in live.nodes.items():
            if not node.is_folder and os.path.exists(path):
                node.now = Path(path).read_bytes()
        found = Names(dict(self._begin.nodes))
        last = len(acts) if outcome == "names" else 0 if outcome == "strict" else chance.randrange(len(acts) + 1)
        for number, act in enumerate(acts):
            if act.lasts or number < last:
                found.apply(act)
        shutil.rmtree(self._trial)
        for path, node in sorted(found.nodes.items()):
            if node.is_folder:
                Path(path).mkdir()
            else:
                Path(path).write_bytes(_torn(node, chance) if outcome == "torn" else node.durable)
        (self._trial / TEMPORARY).mkdir(exist_ok=True)

    def _read(self, log: Path) -> tuple[list[Act], Names]:
        acts, live = list[Act](), Names(dict(self._begin.nodes))
        for line in log.read_text().splitlines() if log.exists() else []:
            kind, path, target, content = json.loads(line)
            if kind == "fsync":
                if path in live.nodes and live.nodes[path].is_folder:
                    _sync(acts, path)
                elif path in live.nodes:
                    live.nodes[path].durable = base64.b64decode(content)
            elif kind not in ("write", "truncate"):
                folders = {os.path.dirname(name) for name in (path, target) if name}
                node = Node(kind == "mkdir") if kind in ("mkdir", "create") else live.nodes.get(path)
                node = None if kind == "rename" and node is not None and node.is_folder else node
                acts.append(Act(kind, path, target, folders, node))
                live.apply(acts[-1])
        return acts, live


def _sync(acts: list[Act], folder: str) -> None:
    """Make changes in a folder durable; a move between two folders also makes the other's earlier changes durable."""
    folders = {folder}
    for act in reversed(acts):
        if act.folders & folders:
            act.lasts = True
            folders |= act.folders


def _torn(node: Node, chance: random.Random) -> bytes:
    if node.now == node.durable:
        return node.durable
    half = node.now[: chance.randrange(len(node.now) + 1)]
    return chance.choice((node.now, half, bytes(len(node.now)), node.durable))
