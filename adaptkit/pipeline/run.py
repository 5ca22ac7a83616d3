"""Run a recipe: find its sources, run the steps that must be run, and write the lock.

A step's key is a hash of its kind, its options, adaptkit's version, and the content of its inputs. If an earlier run
recorded the same key, and the artifacts are unchanged, the step is kept. So when a step runs again, steps that depend
on it run again only if its output changed. Gates are judged in every run. Steps that publish are also run every time;
they send only what the Hub does not have.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptkit.arguments import AnyPath, as_path, check_flags, checked_options
from adaptkit.checkpoint.signing import Signer
from adaptkit.errors import AdaptkitError, GateError, IntegrityError, UsageError
from adaptkit.pipeline.early import check_sources, prefix_errors, rejections_noted
from adaptkit.pipeline.lock import Lock, lock_path
from adaptkit.pipeline.options import RunOptions
from adaptkit.pipeline.reading import read_recipe
from adaptkit.pipeline.recipe import Recipe, Source, Step
from adaptkit.pipeline.report import InputReport, Listener, OutputReport, RunReport, StepResult
from adaptkit.pipeline.sources import Hashes, Location, StepInput, check_apart, digest_of, locate, resolve
from adaptkit.pipeline.steps._kind import Work
from adaptkit.pipeline.work import HASHES_NAME, WORK_NAME, Record, WorkFolder, step_key

__all__ = ["InputReport", "Listener", "OutputReport", "RunReport", "StepResult", "run"]


def run(
    recipe: AnyPath, options: RunOptions | None = None, *, dry_run: bool = False, listener: Listener | None = None
) -> RunReport:
    """Make what a recipe describes, and write its lock.

    Args:
        recipe: path of a YAML or JSON file; see ``pipeline.recipe``.
        options: of the run; None for the defaults.
        dry_run: check everything that can be checked and report what would be done; write nothing, download no weights.
        listener: callbacks for the run's events.

    Raises:
        ConfigError: the recipe is invalid; names file, line and path of the value.
        DriftError: with ``locked``, something differs from the lock.
        GateError: a figure is out of its limits, or a program could not load an artifact; nothing more is published.
        ConflictError: another run is using the same work folder.
        AdaptkitError: any error of a step's operation, prefixed with the step's name.
    """
    check_flags(dry_run=dry_run)
    recipe = as_path(recipe, "recipe")
    options = checked_options(options, RunOptions)
    read = read_recipe(recipe)
    steps = read.until(options.until) if options.until is not None else list(read.steps.values())
    publishing = next((step for step in steps if step.how.publishes), None)
    if options.offline and publishing is not None:
        hint = "leave out --offline, or stop before this step with --until STEP"
        raise publishing.place.error(f"{publishing.kind} needs the network", hint=hint)
    if options.signer is not None and not any(getattr(step.options, "sign", False) for step in steps):
        raise UsageError(f"{recipe}: no step that runs signs anything", hint="leave out --sign, or add sign: true")
    running = _Run(read, steps, options, dry_run, listener or Listener())
    if dry_run:
        return running.all()
    with running.work.locked():
        return running.all()


class _Run:
    """One run of a recipe."""

    def __init__(
        self, recipe: Recipe, steps: list[Step], options: RunOptions, dry_run: bool, listener: Listener
    ) -> None:
        self._recipe, self._steps, self._options, self._dry_run = recipe, steps, options, dry_run
        self._listener, self._folder = listener, recipe.path.parent
        root = options.work if options.work is not None else self._folder / WORK_NAME
        self.work = WorkFolder(root, options.verify)
        check_apart(recipe.sources.values(), self._folder, root)
        self._hashes = Hashes(self.work.root / HASHES_NAME, fresh=options.verify)
        self._materials: dict[str, StepInput] = {}
        self._with_card = {name for step in recipe.steps.values() for taken, name in step.takes() if taken.with_card}
        self._lock = Lock(recipe, options.locked)
        self._signer = options.signer or Signer()
        self._unchecked = list(steps)

    def all(self) -> RunReport:
        """Find the sources and run the steps; in a dry run, only report."""
        began = time.monotonic()
        sources = tuple(self._find_sources())
        steps = tuple(self._plan(step) if self._dry_run else self._do(step) for step in self._steps)
        state = "kept"
        if self._options.locked and not self._dry_run and self._options.until is None:
            self._lock.require_whole()
        if not self._options.locked and not self._dry_run:
            self._lock_others()
            state = "written" if self._lock.write() else "unchanged"
        return RunReport(
            recipe=str(self._recipe.path),
            name=self._recipe.name,
            lock=str(lock_path(self._recipe.path)),
            lock_state=state,
            sources=sources,
            steps=steps,
            seconds=time.monotonic() - began,
        )

    def _lock_others(self) -> None:
        """Lock the steps that ``until`` excludes, as far as their inputs are known."""
        for step in self._recipe.steps.values():
            key = step_key(step, self._materials)
            if key is not None and step not in self._steps:
                self._lock.add(step.entry, "steps", step.name, "recipe")
                self._lock.add(key, "steps", step.name, "key")

    def _find_sources(self) -> list[InputReport]:
        """Find and hash the sources; local ones are checked before anything is downloaded or hashed."""
        note, offline = self._listener.note, self._options.offline
        located: dict[str, Location] = {}
        for is_here in (True, False):
            for source in self._recipe.sources.values():
                if (source.path is not None) == is_here:
                    located[source.name] = locate(source, self._folder, self._lock, offline=offline, note=note)
            if is_here:
                check_sources(self._recipe, self._steps, _paths(located))
        reports = [self._find_source(source, located[name]) for name, source in self._recipe.sources.items()]
        if not self._dry_run:
            self._hashes.save()
        fetched = _paths({name: self._materials[name] for name, source in self._recipe.sources.items() if source.repo})
        check_sources(self._recipe, self._steps, fetched)
        return reports

    def _find_source(self, source: Source, location: Location) -> InputReport:
        self._listener.on_start(source)
        found = resolve(
            source,
            location,
            self._hashes,
            with_card=source.name in self._with_card,
            fetch=not self._dry_run,
            progress=self._listener.source_progress,
            note=self._listener.note,
        )
        self._materials[source.name] = found
        if found.path is not None:
            self._lock.add(found.lock_entry, "sources", source.name)
        report = InputReport(
            name=source.name,
            what=str(source),
            commit=found.lock_entry.get("commit"),
            digest=found.digest,
            bytes=found.nbytes,
            is_here=found.path is not None,
        )
        self._listener.on_end(report)
        return report

    def _plan(self, step: Step) -> StepResult:
        """Return a report of what a run would do with the step."""
        key = step_key(step, self._materials)
        if key is None:
            self._precheck()
            was_run = any(self.work.root.glob(f"*/{step.name}.json"))
            return self._report(step, "may follow" if was_run else "to do")
        if step.how.publishes:
            return self._report(step, "to do", figure=self._rehearse(step, key), key=key)
        record = self.work.find(step, key, self._listener.note)
        if record is None:
            self._precheck()
            return self._report(step, "to do", key=key)
        outputs = self._register_outputs(step, record)
        judgement = step.how.judge(step.options, record.facts)
        figure = f"{record.figure}; the run would stop here: {judgement}" if judgement else record.figure
        return self._report(step, "kept", figure=figure, key=key, outputs=outputs, facts=record.facts)

    def _do(self, step: Step) -> StepResult:
        """Run a step, or keep its outputs of an earlier run, and judge it if it is a gate."""
        began, key = time.monotonic(), step_key(step, self._materials)
        if key is None:
            raise ValueError(f"{step.name}: an input is not known")
        self._lock.add(step.entry, "steps", step.name, "recipe")
        self._lock.add(key, "steps", step.name, "key")
        record = None if step.how.publishes else self.work.find(step, key, self._listener.note)
        state = "done" if record is None else "kept"
        if record is None:
            record = self._make(step, key)
        outputs, seconds = self._register_outputs(step, record), time.monotonic() - began
        judgement = step.how.judge(step.options, record.facts)
        report = self._report(
            step,
            "failed" if judgement else state,
            seconds=seconds,
            figure=f"{record.figure}: {judgement}" if judgement else record.figure,
            key=key,
            outputs=outputs,
            facts=record.facts,
        )
        self._listener.on_end(report)
        if judgement:
            raise GateError(
                f"{self._recipe.path}: the gate {step.name} failed: {judgement}",
                hint="change the model or the limits, then run it again; finished steps are kept",
            )
        return report

    def _make(self, step: Step, key: str) -> Record:
        if step.how.publishes:
            self._rehearse_others(step)
        else:
            self._precheck()
        self._listener.on_start(step)
        self._require_unchanged(step)
        self.work.begin(step, key)
        with prefix_errors(step), self._advise_on_damage(step):
            outcome = step.how.run(self._work_of(step, key))
        try:
            self._require_unchanged(step)
        except (AdaptkitError, OSError):
            self.work.begin(step, key)  # discard the outputs: the key hashes the source as it was before
            raise
        return self.work.finish(step, key, outcome.figure, outcome.facts)

    def _precheck(self) -> None:
        """Before the first step that has to run, check what may keep others from publishing, whatever it makes."""
        unchecked, self._unchecked = self._unchecked, []
        for step in unchecked:
            if step.how.precheck is not None:
                with rejections_noted(step, self._dry_run, self._listener):
                    step.how.precheck(step.options, self._signer, self._listener.note_of(step))

    def _rehearse(self, step: Step, key: str) -> str:
        """Return a summary of what a step that publishes would send; empty in a dry run if it would be rejected."""
        with rejections_noted(step, self._dry_run, self._listener):
            return step.how.rehearse(self._work_of(step, key)) if step.how.rehearse is not None else ""
        return ""

    def _rehearse_others(self, step: Step) -> None:
        """Before the first step that publishes, rehearse the others, so that nothing is sent if one would fail."""
        first, *others = [each for each in self._steps if each.how.publishes]
        for other in others if step is first else ():
            key = step_key(other, self._materials)
            if key is not None:
                self._rehearse(other, key)

    @contextmanager
    def _advise_on_damage(self, step: Step) -> Iterator[None]:
        """Add to the hint for damaged input, if a step made some of it, how to make it again."""
        try:
            yield
        except IntegrityError as error:
            if any(name not in self._recipe.sources for _, name in step.takes()):
                error.advise("run it again with --verify, which makes damaged outputs of steps again")
            raise

    def _require_unchanged(self, step: Step) -> None:
        """Check that the step's sources did not change since they were hashed, which may be hours ago."""
        for name in dict.fromkeys(name for _, name in step.takes() if name in self._recipe.sources):
            material = self._materials[name]
            if material.path is None:
                continue
            if digest_of(material.path, self._hashes, with_card=name in self._with_card) != material.digest:
                raise IntegrityError(
                    f"{step.name}: the source {name} changed during the run",
                    hint="run the same command again when nothing writes to that source",
                )

    def _work_of(self, step: Step, key: str) -> Work:
        paths: dict[str, tuple[Path, ...]] = {}
        for taken, name in step.takes():
            path = self._materials[name].path
            if path is not None:
                paths[taken.key] = (*paths.get(taken.key, ()), path)
        return Work(
            paths=paths,
            options=step.how.with_paths(step.options, step.inputs, paths),
            output=self.work.output(key, step.name),
            progress=self._listener.progress,
            note=self._listener.note_of(step),
            signer=self._signer,
        )

    def _register_outputs(self, step: Step, record: Record) -> tuple[OutputReport, ...]:
        """Add a step's outputs to the lock (not in a dry run) and to the materials of other steps."""
        outputs = record.outputs
        if not self._dry_run and outputs:
            self._lock.add(outputs, "steps", step.name, "outputs")
        reports = []
        for name, digest in outputs.items():
            path, nbytes = self.work.output(record.key, name), self.work.nbytes(record.key, name)
            self._materials[name] = StepInput(path, digest, nbytes, {})
            reports.append(OutputReport(name, str(path), nbytes, digest))
        return tuple(reports)

    def _report(self, step: Step, state: str, **more: Any) -> StepResult:
        taken = dict.fromkeys(name for _, name in step.takes())
        return StepResult(step.name, step.kind, tuple(taken), step.needs, tuple(step.makes), state, **more)


def _paths(located: Mapping[str, Location | StepInput]) -> dict[str, Path]:
    return {name: place.path for name, place in located.items() if place.path is not None}
