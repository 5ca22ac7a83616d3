"""``adaptkit run``."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import chosen, report_file_option, report_options, settings_options, signer_with
from adaptkit.cli.output import check_place, check_report_file, counted, in_turn, show, write_report
from adaptkit.cli.paths import LocalPath
from adaptkit.cli.progress import Bar
from adaptkit.cli.release_view import source_text, step_text, summary, table, tree
from adaptkit.errors import DISK_HINTS, AdaptkitError, UsageError
from adaptkit.hub.secrets import redact
from adaptkit.pipeline.options import RunOptions

if TYPE_CHECKING:
    from adaptkit.pipeline.recipe import Source, Step
    from adaptkit.pipeline.run import InputReport, RunReport, StepResult


@click.command()
@click.argument("recipe", type=LocalPath())
@settings_options(RunOptions)
@click.option("--sign", "key", type=LocalPath(), metavar="KEY",
              help="Key for steps with sign: true. Default: the identity of the CI job or of the user.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show what would be done; write nothing.")
@click.option("--summary", "summary_file", type=LocalPath(dir_okay=False), metavar="FILE",
              help="Append a Markdown summary to this file. Default: $GITHUB_STEP_SUMMARY, if set.")  # fmt: skip
@report_file_option
@report_options
def command(
    recipe: Path,
    dry_run: bool,
    summary_file: Path | None,
    key: Path | None,
    output_file: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Build the release that the file RECIPE describes.

    docs/release.md describes the format.

    Steps whose inputs and options did not change are kept; an interrupted run resumes when it is started again. Hashes
    of all inputs and outputs are written to the recipe's .lock. The Hub's token and the key's password come from the
    environment, as for publish. Exits with 9 if a gate fails, and with 3 if --locked finds a difference.
    """
    page = None if dry_run else summary_file or _from_environment()
    own = {os.path.realpath(path) for path in (recipe, recipe.with_suffix(".lock"))} if recipe.is_file() else set()
    for place in (output_file, summary_file):
        if place is not None and os.path.realpath(place) in own:
            raise UsageError(f"{place}: is the recipe or its lock", hint="choose another file for the report")
    if output_file is not None and page is not None and os.path.realpath(output_file) == os.path.realpath(page):
        raise UsageError(f"{output_file}: cannot hold both the report and the summary", hint="choose two files")
    if page is not None:
        check_place(page, "--summary" if summary_file else "$GITHUB_STEP_SUMMARY")
    if options["offline"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # adaptkit shows its own
    from adaptkit.training.product_cache import limit_product_cache

    limit_product_cache()
    from adaptkit.pipeline.run import Listener, RunReport, run

    if output_file:
        check_report_file(output_file, RunReport)
    signer = None if key is None else signer_with(key)
    watch = _Watch(hidden=as_json or quiet, quiet=quiet)
    listener = Listener(watch.started, watch.bar.update, watch.bar.update, watch.bar.note, watch.ended)
    with _failure_added(recipe, page, watch):
        report = run(recipe, chosen(RunOptions, options, signer=signer), dry_run=dry_run, listener=listener)
    written: list[Callable[[], None]] = []
    if output_file and not dry_run:
        written.append(partial(write_report, report, output_file))
    if page is not None:
        written.append(partial(_add, page, summary(report.name, watch.sources, watch.steps, "All steps are done.")))
    above = tree(report) if dry_run else table(report.steps)
    in_turn(*written, partial(show, report, _rows(report, dry_run), as_json=as_json, quiet=quiet, above=above))


def _rows(report: "RunReport", dry_run: bool) -> Iterator[tuple[str, str]]:
    if dry_run:
        count = sum(step.state != "kept" for step in report.steps)
        yield report.name, f"{count} of {counted(len(report.steps), 'step')} would run"
        return
    done = sum(step.state == "done" for step in report.steps)
    yield (report.name, f"{counted(done, 'step')} done, {len(report.steps) - done} kept, {report.seconds:.1f} s")
    words = {"kept": "unchanged; nothing differs from it"}
    yield "lock", f"{report.lock}: {words.get(report.lock_state, report.lock_state)}"
    for output in (output for step in report.steps for output in step.outputs):
        yield output.name, output.path


def _from_environment() -> Path | None:
    named = os.environ.get("GITHUB_STEP_SUMMARY")
    return Path(named) if named else None


@contextmanager
def _failure_added(recipe: Path, page: Path | None, watch: "_Watch") -> Iterator[None]:
    """Remove the bar after the block; append a summary page to a file if it fails for any reason."""
    try:
        yield
    except BaseException as error:
        if page is not None:
            said = redact(error.message if isinstance(error, AdaptkitError) else str(error))
            ending = f"Stopped: {said}" if said else "Stopped."
            try:
                _add(page, summary(recipe.name, watch.sources, watch.steps, ending))
            except AdaptkitError as also:  # it must not hide the error that stopped the run
                watch.bar.note(f"warning: {also.message}")
        raise
    finally:
        watch.bar.stop()


def _add(page: Path, text: str) -> None:
    from adaptkit.checkpoint.writer import DiskError

    try:
        with page.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        hint = DISK_HINTS.get(error.errno or 0, "")
        raise DiskError(f"{page}: the summary cannot be written: {error.strerror}", hint) from error


class _Watch:
    """Reports a run's progress on stderr, and records it for the summary."""

    def __init__(self, hidden: bool, quiet: bool) -> None:
        self._hidden = hidden
        self.bar = Bar("", hidden, ("TaskProgressColumn",), quiet)
        self.sources: list[InputReport] = []
        self.steps: list[StepResult] = []

    def started(self, part: "Source | Step") -> None:
        """Show a bar for a source or step, or say that the step runs."""
        from adaptkit.pipeline.recipe import Step

        label = f"{part.name}: {part.kind if isinstance(part, Step) else part}"
        if not self.bar.start(label) and isinstance(part, Step):
            self._say(f"{label}: running")

    def ended(self, report: "InputReport | StepResult") -> None:
        """Say what a source is, or what a step did."""
        from adaptkit.pipeline.report import StepResult

        self.bar.stop()
        if isinstance(report, StepResult):
            self.steps.append(report)
            self._say(f"{report.name}: {step_text(report)}")
        else:
            self.sources.append(report)
            self._say(f"{report.name}: {source_text(report)}")

    def _say(self, text: str) -> None:
        if not self._hidden:
            self.bar.print(text)
