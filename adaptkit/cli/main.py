"""The ``adaptkit`` program: finds commands, and is the one place where errors become messages and exit codes."""

import atexit
import gc
import io
import json
import os
import select
import signal
import sys
import traceback
from importlib.util import find_spec
from types import FrameType, TracebackType
from typing import Any, TextIO

import click

from adaptkit import __version__
from adaptkit.cli import commands
from adaptkit.cli.output import silence, told_rank
from adaptkit.discovery import closest, load, names
from adaptkit.errors import DISK_HINTS, AdaptkitError, UsageError
from adaptkit.heap import keep_few_products, keep_freed_memory, take_large_pages
from adaptkit.hub.secrets import redact

INTERRUPTED = 130
TERMINATED = 143
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KEEP_NOTHING = {"check", "diff", "evaluate", "inspect", "plan", "verify"}
"""Commands that begin anew, since they write nothing but what they have found."""

_UNWINDING_SECONDS = 30.0
_SWITCH_SECONDS = 0.0005
"""How long a thread waits for one that holds the interpreter: those that read, write and hash do so between kernels."""

_OLD_COLLECTIONS = 100
"""Ten times what Python begins with: how rarely the collector looks for garbage among all that there is, which is what
libraries hold for good. Importing them takes a fifth less time so."""


class _Commands(click.Group):
    """Loads a command's module only when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return names(commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in names(commands):
            return None
        if find_spec("fcntl") is None:
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
    """A signal arrived; unwinds, so that locks and files are closed. click would add a line to a KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind; but leave at once from the middle of an import, which some modules would go on with half done.

    A signal in the wrong moment leaves a lock of Python's own threading held, and what unwinds may wait for that.
    """
    for again in _SIGNALS:
        signal.signal(again, _leave)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda *_: _leave(number, None))
        signal.setitimer(signal.ITIMER_REAL, _UNWINDING_SECONDS)
    if _is_importing(frame):
        _leave(number, frame)
    raise _Stopped(number)


def _leave(number: int, frame: FrameType | None) -> None:
    """Unwind no further, whatever it waits for, were it a reader of what it says."""
    for name in ("stdout", "stderr"):
        setattr(sys, name, _unwaiting(getattr(sys, name)))
    os._exit(_say_stopped(number))


def _unwaiting(stream: TextIO) -> TextIO:
    """Another stream to the same file, since this one may be in the middle of a write; to none if it takes nothing."""
    number = stream.fileno()
    takes = bool(select.select([], [number], [], 0)[1])
    return open(number if takes else os.devnull, "w", errors="backslashreplace", closefd=not takes)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _say_stopped(number: int) -> int:
    """Say how to go on, and return the exit code."""
    code, word = (INTERRUPTED, "interrupted") if number == signal.SIGINT else (TERMINATED, "terminated")
    goes_on = not _KEEP_NOTHING.intersection(sys.argv[1:2])
    return _fail(code, word, word, "run the same command again to resume" if goes_on else "", True)


def program() -> None:
    """Be a process, from its entry point to its end, with the command line's code.

    Python would take everything apart first, which takes a third of a second where torch is loaded, and more after work
    in threads. What is asked for at exit is done all the same: who asks first is served last, and that is this.
    """
    ended: list[int] = []
    if not atexit._ncallbacks():  # else somebody watches this process who would not be served
        atexit.register(_leave_whole, ended)
    try:
        main()
    except SystemExit as leaving:
        if isinstance(leaving.code, int):
            ended.append(leaving.code)
        raise


def _leave_whole(ended: list[int]) -> None:
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except (OSError, ValueError):
        return  # Python says so, in its own way
    if ended and not hasattr(sys, "last_value"):  # of an error that nobody caught
        os._exit(ended[0])


def main() -> None:
    """Run the command line and exit with its code."""
    sys.excepthook = _show_unknown_error
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # whoever started this has closed it
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may hold what no encoding has
    keep_freed_memory()
    keep_few_products()
    take_large_pages()
    sys.setswitchinterval(_SWITCH_SECONDS)
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, max(old, _OLD_COLLECTIONS))
    try:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a shell
                signal.signal(number, _stop)
        code = _run()
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
    except click.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # which nobody types here: it is a mistake of ours
            raise abort.__cause__ from None
        code = _say_stopped(signal.SIGINT)
    except _Stopped as stopped:
        code = _say_stopped(stopped.number)
    sys.exit(code if isinstance(code, int) else 0)


def _run() -> Any:
    """Run the command; what it made is whole when this returns, and a signal may then end the process at once."""
    try:
        return cli.main(standalone_mode=False)
    finally:
        for number in _SIGNALS:
            if signal.getsignal(number) is _stop:
                signal.signal(number, signal.SIG_DFL)


def _show_unknown_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback, without the tokens that a library may have put into a message."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _as_typed(text: str) -> str:
    if sys.argv[1:2] not in [[known] for known in names(commands)]:
        return text
    from adaptkit.cli.options import as_options

    return as_options(text, load(commands, sys.argv[1], "command"), sys.argv[2:])


def _fail(exit_code: int, code: str, message: str, hint: str, retryable: bool) -> int:
    message, hint = redact(message), redact(hint)
    rank = told_rank()
    # One document, however many processes there are.
    has_speaker = rank != "0" and sys.argv[1:2] in (["train"], ["evaluate"])
    if "--json" in sys.argv[1:] and not has_speaker:
        error: dict[str, Any] = {"code": code, "message": message, "hint": hint, "retryable": retryable}
        _say(json.dumps({"error": error}), sys.stdout)
    else:
        of = f"process {rank}: " if rank != "0" else ""
        hint = hint and f"\n{of}hint: {' '.join(hint.splitlines())}"  # a path may have several
        _say(f"{of}error: {' '.join(message.split())}{hint}", sys.stderr)
    return exit_code


def _say(text: str, stream: TextIO) -> None:
    """Print at once; where nobody reads, the exit code is what is left to tell."""
    try:
        print(f"{text}\n", end="", file=stream, flush=True)  # in one piece, which no other process writes into
    except OSError:
        silence(stream)


if __name__ == "__main__":
    program()
