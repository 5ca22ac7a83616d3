"""Ask transformers what the tensors of a checkpoint are, in a process of its own.

Loaded here it would stay in memory for good, with nearly as much as everything else together, and nothing could stop
it from working for hours on a hostile configuration. Apart, it answers in one line of JSON while others go on.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import AdaptkitError, CheckpointError, UsageError
from adaptkit.operations._roles import Role, Roles, roles_by_name, roles_here

_PATIENCE_SECONDS = 300


class Inquiry:
    """A question that is answered when somebody waits for it; ends its process when it is left.

    There is no process if transformers is loaded already, which makes asking it cheap, or not installed.

    Args:
        checkpoint: unquantized.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._process = checkpoint, None
        if _is_worth_a_process():
            command = [sys.executable, "-m", __spec__.name, str(checkpoint.root.resolve())]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
            self._process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        if self._process is not None:
            self._process.communicate()

    @property
    def takes_long(self) -> bool:
        """Whether there is a process to wait for."""
        return self._process is not None

    def end(self) -> None:
        """End the process; an answer that somebody waits for is then an error."""
        if self._process is not None:
            self._process.kill()

    def answer(self) -> Roles:
        """Wait for what every tensor of the checkpoint is; once.

        Raises:
            UsageError: ``config.json`` describes a model that cannot be built.
            CheckpointError: it describes none that could be this one, or none within minutes.
        """
        root = self._checkpoint.root
        if self._process is None:
            if importlib.util.find_spec("transformers") is None:
                return roles_by_name(self._checkpoint, "transformers is not installed")
            return roles_here(self._checkpoint)
        try:
            output, complaints = self._process.communicate(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise CheckpointError(f"{root}: config.json keeps transformers busy for minutes") from error
        lines = output.splitlines()
        if self._process.returncode != 0 or not lines:
            raise CheckpointError(
                f"{root}: transformers ended with code {self._process.returncode} over config.json",
                hint=(complaints.strip().splitlines() or [""])[-1],
            )
        return _read(json.loads(lines[-1]), root)


def find_roles(checkpoint: Checkpoint) -> Roles:
    """Ask and wait."""
    with Inquiry(checkpoint) as inquiry:
        return inquiry.answer()


def main() -> None:
    """Answer in one line of JSON on stdout; the argument is the folder."""
    answer: dict[str, Any]
    try:
        roles = roles_here(Checkpoint(Path(sys.argv[1])))
    except AdaptkitError as error:
        answer = {"error": error.code, "message": error.message, "hint": error.hint}
    else:
        of = {name: [role.kind, role.is_linear, role.paths] for name, role in roles.of.items()}
        answer = asdict(roles) | {"of": of}
    print(json.dumps(answer))


def _is_worth_a_process() -> bool:
    is_loaded = "transformers" in sys.modules  # as None, where it must not be
    return not is_loaded and bool(sys.executable) and importlib.util.find_spec("transformers") is not None


def _read(answer: dict[str, Any], root: Path) -> Roles:
    if "error" in answer:
        kind = CheckpointError if answer["error"] == "checkpoint" else UsageError
        raise kind(answer["message"].replace(str(root.resolve()), str(root)), answer["hint"])
    of = {name: Role(kind, is_linear, tuple(paths)) for name, (kind, is_linear, paths) in answer["of"].items()}
    return Roles(of, answer["read_from"], answer["head"], answer["tied"])


if __name__ == "__main__":
    main()
