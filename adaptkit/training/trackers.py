"""Trackers: TensorBoard and Weights & Biases, which follow the metrics during a run.

Both are optional. They get the lines of ``metrics.jsonl``: numbers as scalars, answers to prompts as text.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

from adaptkit.errors import UsageError, install_hint
from adaptkit.training.config import TrainConfig

Tracker = Callable[[dict[str, Any]], None]
"""Called with every line of the metrics, in order."""


def require_trackers(config: TrainConfig) -> None:
    """Check that the trackers that a run uses are installed, before it starts.

    Raises:
        UsageError: a package is not installed.
    """
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) is not None and find_spec(name) is None:
            raise UsageError(f"{name}: the package is not installed", hint=install_hint("track"))


@contextmanager
def trackers(config: TrainConfig, identity: Mapping[str, Any], begun: int) -> Iterator[list[Tracker]]:
    """Open the trackers that a run uses, and close them after it.

    Args:
        config: settings of the run.
        identity: the same for a resumed run, different for any other run.
        begun: step to resume from; TensorBoard discards what was logged for later steps before an interruption.
    """
    with ExitStack() as stack:
        opened: list[Tracker] = []
        if config.tensorboard is not None:
            opened.append(stack.enter_context(_tensorboard(config.tensorboard, begun)))
        if config.wandb is not None:
            opened.append(stack.enter_context(_wandb(config, identity)))
        yield opened


@contextmanager
def _tensorboard(folder: str, begun: int) -> Iterator[Tracker]:
    from torch.utils.tensorboard import SummaryWriter

    try:
        opened = SummaryWriter(folder, purge_step=begun + 1 if begun else None)
    except OSError as error:
        raise UsageError(f"tensorboard: {folder}: {error.strerror}", hint="choose another folder") from error
    with opened as writer:

        def add(line: dict[str, Any]) -> None:
            for name, value in _numbers(line).items():
                writer.add_scalar(name, value, line["step"])
            for prompt, answer in line.get("answers", {}).items():
                writer.add_text(prompt, answer, line["step"])

        yield add


@contextmanager
def _wandb(config: TrainConfig, identity: Mapping[str, Any]) -> Iterator[Tracker]:
    """Log to Weights & Biases; its environment variables, such as WANDB_MODE and WANDB_DIR, apply as usual."""
    import wandb

    same = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    quiet = wandb.Settings(silent=True, console="off")
    try:
        opened = wandb.init(project=config.wandb, id=same, resume="allow", config=config.recorded(), settings=quiet)
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"wandb: {reason}", hint="run wandb login, or set WANDB_MODE=offline") from error
    with opened as run:

        def add(line: dict[str, Any]) -> None:
            texts = {f"answer to {prompt!r}": answer for prompt, answer in line.get("answers", {}).items()}
            run.log(_numbers(line) | texts, step=line["step"])

        yield add


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}
