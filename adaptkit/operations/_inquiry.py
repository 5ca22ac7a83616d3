"""Ask transformers, in a child process, what each tensor of a checkpoint is.

Imported into this process, transformers would stay in memory, which it would nearly double, and nothing could stop it
from working for hours on a hostile configuration. A child process sends one JSON document while this process continues.

The answer depends only on the configuration, on names and shapes, and on the code of transformers and of this package,
so it is cached on disk.
"""

import gc
import importlib.util
import json
import re
import sys
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from adaptkit import __version__
from adaptkit.checkpoint import vocabulary
from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.released import open_plain
from adaptkit.checkpoint.remembered import CachedAnswer
from adaptkit.child import can_fork, start_child
from adaptkit.errors import AdaptkitError, CheckpointError, UsageError
from adaptkit.networks import architecture, naming
from adaptkit.operations import _roles, _vocabulary
from adaptkit.operations._roles import Role, Roles, determine_roles
from adaptkit.torch_compiler import leave_compiler_out

_TIMEOUT_SECONDS = 300
_VERSION = re.compile(r"""^__version__ = ["']([^"']+)["']""", re.MULTILINE)


class Inquiry:
    """A question to transformers that a forked child process answers; a context manager that kills the process on exit.

    No process is forked if the answer is cached, if forking is unsafe or not allowed, if transformers is not installed,
    or if it is imported already, so that asking it here is cheap.

    Args:
        checkpoint: unquantized.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._process, self._connection = None, None
        self._cached: Roles | None = None
        if _should_fork():
            self._remembered = CachedAnswer(_cache_key(checkpoint))
            self._cached = _parse_cached(self._remembered.read(), checkpoint)
            if self._cached is None:
                self._process, self._connection = start_child(_answer, checkpoint.root.resolve())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def takes_long(self) -> bool:
        """Whether a child process was started to find the answer."""
        return self._process is not None

    def end(self) -> None:
        """Kill the process; a thread that waits in ``answer`` then gets an error."""
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def answer(self) -> Roles:
        """Wait for the roles of the checkpoint's tensors; call this once.

        Raises:
            UsageError: ``config.json`` describes a model that cannot be built.
            CheckpointError: its model cannot be this checkpoint's, or transformers crashes or takes over 5 minutes.
        """
        root = self._checkpoint.root
        if self._cached is not None:
            return self._cached
        if self._process is None or self._connection is None:
            return determine_roles(self._checkpoint)
        if not self._connection.poll(_TIMEOUT_SECONDS):
            raise CheckpointError(
                f"{root}: transformers did not finish building the model from config.json within {_TIMEOUT_SECONDS} s",
                hint="check the sizes in config.json",
            )
        try:
            text = self._connection.recv_bytes()
        except EOFError as error:
            self._process.join()
            raise CheckpointError(
                f"{root}: transformers crashed with exit code {self._process.exitcode} while building the model "
                "from config.json",
                hint="check config.json, or update transformers",
            ) from error
        answer = json.loads(text)
        roles = _read(answer, root)
        if answer.pop("to") == self._remembered.name:  # differs if the folder changed meanwhile
            self._remembered.keep(answer)
        return roles


def find_roles(checkpoint: Checkpoint) -> Roles:
    """Return the roles of a checkpoint's tensors; see ``Inquiry``."""
    with Inquiry(checkpoint) as inquiry:
        return inquiry.answer()


def _answer(connection: Connection, root: Path) -> None:
    """Send the answer, or an error, as one JSON document; runs in the child process."""
    gc.disable()  # collecting takes a quarter of the time of importing transformers; this process is short-lived
    leave_compiler_out()
    answer: dict[str, Any]
    try:
        checkpoint = open_plain(root)
        roles = determine_roles(checkpoint)
    except AdaptkitError as error:
        answer = {"error": error.code, "message": error.message, "hint": error.hint}
    else:
        of = {name: [role.kind, role.is_linear, role.paths] for name, role in roles.of.items()}
        answer = asdict(roles) | {"of": of, "to": CachedAnswer(_cache_key(checkpoint)).name}
    connection.send_bytes(json.dumps(answer).encode())


def _should_fork() -> bool:
    is_loaded = "transformers" in sys.modules  # its entry is None if importing it is blocked
    return not is_loaded and can_fork() and importlib.util.find_spec("transformers") is not None


def _cache_key(checkpoint: Checkpoint) -> list[Any] | None:
    """Return everything that determines the answer: the configuration, shapes, versions and hashes of the code.

    None, which disables the cache, if transformers is a development version or its files cannot be read.
    """
    spec = importlib.util.find_spec("transformers")
    package = Path(spec.origin).parent if spec and spec.origin else Path()
    try:
        version = _VERSION.search((package / "__init__.py").read_text())
        if version is None or "dev" in version[1]:
            return None
        shapes = {name: located.spec.shape for name, located in checkpoint.tensors.items()}
        ours = [Path(str(module.__file__)) for module in (_roles, _vocabulary, vocabulary, architecture, naming)]
        rules = [[str(path), file_sha256(path)] for path in (*ours, *_modelling_files(package, checkpoint))]
        return [checkpoint.config, shapes, version[1], __version__, rules]
    except (OSError, ValueError, AdaptkitError):
        return None


def _modelling_files(package: Path, checkpoint: Checkpoint) -> list[Path]:
    """Return the files of transformers that define this type of model."""
    kind = str(checkpoint.config.get("model_type")).replace("-", "_")
    own = sorted((package / "models" / kind).glob("*.py")) if kind.isidentifier() else []
    return [package / "modeling_utils.py", package / "models" / "auto" / "modeling_auto.py", *own]


def _parse_cached(answer: dict[str, Any] | None, checkpoint: Checkpoint) -> Roles | None:
    """Parse a cached answer; None if it is absent, malformed or about other tensors."""
    try:
        roles = _read(answer or {}, checkpoint.root)
    except (LookupError, TypeError, ValueError, AttributeError, AdaptkitError):
        return None
    return roles if roles.of.keys() == checkpoint.tensors.keys() else None


def _read(answer: dict[str, Any], root: Path) -> Roles:
    if "error" in answer:
        kind = CheckpointError if answer["error"] == "checkpoint" else UsageError
        raise kind(answer["message"].replace(str(root.resolve()), str(root)), answer["hint"])
    of = {name: Role(kind, is_linear, tuple(paths)) for name, (kind, is_linear, paths) in answer["of"].items()}
    return Roles(of, answer["read_from"], answer["head"], answer["tied"])
