"""The ``adaptkit`` program: dispatches commands and converts errors to messages and exit codes."""

import io
import json
import os
import signal
import sys
import traceback
from importlib.util import find_spec
from types import FrameType, TracebackType
from typing import Any, TextIO

import click

from adaptkit import __version__
from adaptkit.cli import commands
from adaptkit.cli.output import is_discarded, plain, silence, torchrun_rank
from adaptkit.cli.repositories import as_repositories
from adaptkit.discovery import closest, load, names
from adaptkit.errors import DISK_HINTS, AdaptkitError, UsageError
from adaptkit.hub.secrets import redact
from adaptkit.machine import share_processors

_STOPPED: dict[int, tuple[int, str]] = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
"""Exit code and word of each signal that stops a command."""
_IS_POSIX = find_spec("fcntl") is not None
_NOT_RESUMABLE = {"check", "diff", "evaluate", "inspect", "plan", "verify"}
"""Commands that cannot resume: they write only their report."""


class _Commands(click.Group):
    """Loads a command's module only when that command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return names(commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in names(commands):
            return None
        if not _IS_POSIX:
            raise UsageError(
                "adaptkit runs on Linux and other POSIX systems, not on this one", hint="on Windows, run it in WSL"
            )
        command: click.Command = load(commands, cmd_name, "command")
        command.name = cmd_name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0].startswith("-") or self.get_command(ctx, args[0]) is not None:
            return super().resolve_command(ctx, args)
        close = closest(args[0], names(commands))
        hint = f"did you mean {close!r}?" if close else "see adaptkit --help"
        raise UsageError(f"unknown command {args[0]!r}", hint=hint)


@click.group(
    cls=_Commands,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="adaptkit")
def cli() -> None:
    """Quantize, fine-tune, merge, unmerge and publish language-model adapters, on checkpoint files.

    A path is a local folder, or org/name[@revision] on the Hugging Face Hub.
    """


class _Stopped(BaseException):
    """Raised by a signal, to close locks and files; not a KeyboardInterrupt, to which click would add a line."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind at a signal; another one exits at once, even if the unwinding waits for something."""
    for again in _STOPPED:
        signal.signal(again, _exit_at_once)
    raise _Stopped(number)


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(_STOPPED[number][0])


def _say_stopped(number: int) -> int:
    """Print that the command was stopped and how to resume, and return the exit code."""
    code, word = _STOPPED[number]
    goes_on = not _NOT_RESUMABLE.intersection(sys.argv[1:2])
    return _fail(code, word, word, "run the same command again to resume" if goes_on else "", True)


def main() -> None:
    """Run the command line and exit with its code."""
    sys.excepthook = _show_unknown_error
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may contain undecodable bytes
    share_processors()
    try:
        for number in _STOPPED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored for background jobs of a shell
                signal.signal(number, _stop)
        code = cli.main(standalone_mode=False)
    except AdaptkitError as error:
        say = _as_typed if isinstance(error, UsageError) else str
        code = _fail(error.exit_code, error.code, say(error.message), say(error.hint), error.retryable)
    except OSError as error:
        if error.errno not in DISK_HINTS:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        code = _fail(AdaptkitError.exit_code, "disk", f"{where}{error.strerror}", DISK_HINTS[error.errno], False)
    except click.UsageError as error:
        asked = f"{error.ctx.command_path} --help" if error.ctx else "adaptkit --help"
        code = _fail(error.exit_code, "usage", error.format_message(), f"see {asked}", False)
    except click.ClickException as error:
        code = _fail(error.exit_code, "usage", error.format_message(), "", False)
    except click.Abort as abort:  # click turns an EOFError into one; nothing here reads typed input, so it is a bug
        raise abort.__cause__ or abort from None
    except _Stopped as stopped:
        code = _say_stopped(stopped.number)
    finally:  # all is written or undone
        for number in _STOPPED:
            if signal.getsignal(number) is _stop:
                signal.signal(number, _exit_at_once)
    sys.exit(code if isinstance(code, int) else 0)


def _show_unknown_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback with tokens redacted, since libraries may put them into messages."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _as_typed(text: str) -> str:
    if not _IS_POSIX or sys.argv[1:2] not in [[known] for known in names(commands)]:
        return text
    from adaptkit.cli.options import as_options

    return as_options(text, load(commands, sys.argv[1], "command"), sys.argv[2:])


def _fail(exit_code: int, code: str, message: str, hint: str, retryable: bool) -> int:
    message, hint = as_repositories(redact(message)), as_repositories(redact(hint))
    rank = torchrun_rank()
    # In train and evaluate, only rank 0 prints the JSON document.
    has_speaker = rank != "0" and sys.argv[1:2] in (["train"], ["evaluate"])
    if "--json" in sys.argv[1:] and not has_speaker and not is_discarded(sys.stdout):
        error: dict[str, Any] = {"code": code, "message": message, "hint": hint, "retryable": retryable}
        if _say(json.dumps({"error": error}), sys.stdout):
            return exit_code
    of = f"process {rank}: " if rank != "0" else ""
    hint = hint and f"\n{of}hint: {' '.join(hint.splitlines())}"  # a path may contain line breaks
    _say(plain(f"{of}error: {' '.join(message.split())}{hint}"), sys.stderr)
    return exit_code


def _say(text: str, stream: TextIO) -> bool:
    """Print at once; return whether the stream could be written."""
    try:
        print(f"{text}\n", end="", file=stream, flush=True)  # one write: other processes print too
    except OSError:
        silence(stream)
        return False
    return True


if __name__ == "__main__":
    main()
