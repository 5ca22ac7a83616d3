"""Read and check a recipe; errors name file, line and path of the value."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from adaptkit.discovery import load, names
from adaptkit.documents import Place, check_keys, nearest, read_document
from adaptkit.errors import ConfigError, UsageError
from adaptkit.hub.names import check_repo_id
from adaptkit.pipeline import steps as registry
from adaptkit.pipeline.artifact import check_kind
from adaptkit.pipeline.recipe import Recipe, Source, Step
from adaptkit.pipeline.steps._kind import Input, StepKind
from adaptkit.settings import IN_QUOTES, read_settings

_NAME = re.compile(r"(?!.*\.(partial|replaced|json)$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_EXAMPLE = "write, for example, base: {repo: org/name, revision: main}"


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigError: the recipe is invalid; names file, line and path of the value.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # reading a pipe may block
        raise ConfigError(f"{path}: is not a regular file", hint="save the recipe as a file; its lock lies beside it")
    document = read_document(path)
    top = Place(document)
    values = check_keys(document.values, ("name", "sources", "steps"), top)
    for key in ("name", "sources", "steps"):
        if not values.get(key):
            raise top.error(f"{key} is missing", hint="a recipe needs a name, sources and steps")
    if not isinstance(values["name"], str):
        raise top.at("name").error("is not text", hint=IN_QUOTES)
    listed = {key: _named(values[key], top.at(key)) for key in ("sources", "steps")}
    sources = {name: _source(name, entry, top.at("sources", name)) for name, entry in listed["sources"].items()}
    steps = [_step(name, entry, top.at("steps", name)) for name, entry in listed["steps"].items()]
    _check_names(sources, steps)
    for step in steps:
        _check_references(step, sources, steps)
    _check_used(sources, steps)
    _check_targets(steps)
    _check_own_sources(sources.values(), steps)
    recipe = Recipe(path, values["name"], sources, {step.name: step for step in steps})
    guarded = replace(recipe, steps={name: _guarded(recipe, step) for name, step in _ordered(recipe).items()})
    return replace(guarded, steps=_ordered(guarded))


def _named(entries: Any, place: Place) -> Mapping[str, Any]:
    if not isinstance(entries, Mapping):
        raise place.error("expected names, each with its settings", hint="write, for example, base: {path: model}")
    for name in entries:
        if not _NAME.fullmatch(name):
            raise place.at(name).error("is not a valid name", hint="use at most 64 letters, digits, '-', '_' and '.'")
    return entries


def _source(name: str, entry: Any, place: Place) -> Source:
    values = check_keys(entry, ("path", "repo", "revision"), place)
    for key, value in values.items():
        if not isinstance(value, str) or not value:
            advice = IN_QUOTES if isinstance(value, int | float) else _EXAMPLE
            raise place.at(key).error(f"is {value!r}; expected text", advice)
    if ("path" in values) == ("repo" in values):
        raise place.error("expected either a path or a repo", _EXAMPLE)
    if "path" in values:
        if "revision" in values:
            raise place.at("revision").error("only a repo has revisions", hint="remove it, or use repo instead of path")
        path = PurePosixPath(values["path"])
        if path.is_absolute() or str(path).startswith("~") or os.path.isabs(values["path"]):
            raise place.at("path").error(
                "must be relative to the recipe's folder", hint="write, for example, ../models/base"
            )
        return Source(name, place, path=str(path))
    try:
        check_repo_id(values["repo"])
    except UsageError as error:
        hint = "give what follows the @ under the key revision" if "@" in values["repo"] else error.hint
        raise place.at("repo").error(error.message, hint) from error
    return Source(name, place, **values)


def _step(name: str, entry: Any, place: Place) -> Step:
    known = names(registry)
    if not isinstance(entry, Mapping) or not entry:
        raise place.error(
            "expected what to do, such as {quantize: base}", hint=f"known kinds of steps: {', '.join(known)}"
        )
    kind = next(iter(entry))
    if kind not in known:
        hint = f"a step's first key says what it does; {nearest(kind, known, 'known kinds of steps')}"
        raise place.at(kind).error(f"{kind!r} is not a kind of step", hint=hint)
    how: StepKind = load(registry, kind, "KIND")
    values = _copied(entry)
    needs = _references(Input("needs", many=True), values, place)
    inputs = {taken.key: _references(taken, values, place) for taken in how.inputs}
    inputs = {key: found for key, found in inputs.items() if found}
    for taken in how.inputs:
        if taken.required and taken.key not in inputs:
            raise place.error(f"{taken.key} is missing", hint=f"add {taken.key}: the name of a source or step")
    refused = next((key for key in values if key in how.refused), None)
    if refused is not None:
        raise place.at(refused).error("cannot be set in a recipe", hint=how.refused[refused])
    keys = [field.name for field in fields(how.options) if field.name not in how.refused]
    check_keys(values, keys, place, how.options.other_names)
    try:
        options = read_settings(how.options, _with_placeholders(how, values, inputs), place)
        how.validate(options, inputs)
    except ConfigError as error:
        error.advise(how.with_keys(error.hint))
        raise
    except UsageError as error:
        raise place.error(error.message, how.with_keys(error.hint)) from error
    makes = {name + suffix: made for suffix, made in how.makes(options).items()}
    return Step(name, kind, how, options, inputs, needs, makes, entry, place)


def _references(taken: Input, values: dict[str, Any], place: Place) -> tuple[str, ...]:
    """Remove an input's key from a step's values, and return the names that it lists."""
    *outer, last = taken.key.split(".")
    for key in outer:
        values = values.get(key, {})
        if not isinstance(values, dict):
            return ()
    place = place.at(*outer, last)
    value = values.get(last)
    if last not in values or (isinstance(value, str) and value in taken.words):
        return ()
    found = value if taken.many else [value]
    if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
        expected = "a list of names of sources or steps" if taken.many else "the name of a source or step"
        advice = f"write [{value}]" if taken.many and isinstance(value, str) else ""
        raise place.error(f"expected {expected}", hint=advice)
    del values[last]
    twice = next((name for number, name in enumerate(found) if name in found[:number]), None)
    if twice is not None:
        raise place.error(f"{twice!r} is listed twice")
    return tuple(found)


def _with_placeholders(how: StepKind, values: dict[str, Any], inputs: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Return the values with names in place of paths that are known only when the step runs."""
    for taken in how.inputs:
        if taken.field and taken.key in inputs:
            *outer, last = taken.field.split(".")
            holder = values
            for key in outer:
                holder = holder[key]
            holder[last] = list(inputs[taken.key]) if taken.many else "."
    return values


def _copied(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in entry.items()}


def _check_names(sources: Mapping[str, Source], steps: Sequence[Step]) -> None:
    """Reject names with two meanings; compares without case, since some file systems ignore it."""
    seen: dict[str, str] = {name.casefold(): f"the source {name!r}" for name in sources}
    words = {word: step for step in steps for taken in step.how.inputs for word in taken.words}
    for source in sources.values():
        if source.name in words:
            raise source.place.error(f"the name has another meaning in {words[source.name].kind}", hint="rename it")
    if len(seen) < len(sources):
        raise next(iter(sources.values())).place.error(
            "two sources have names that differ only in case", hint="rename one of them"
        )
    for step in steps:
        for made in {step.name, *step.makes}:
            if made.casefold() in seen:
                other = seen[made.casefold()]
                raise step.place.error(f"{made!r} is also the name of {other}", hint="give one of them another name")
            if made in words:
                raise step.place.error(f"{made!r} has another meaning in {words[made].kind}", hint="rename it")
        seen |= {made.casefold(): f"what the step {step.name!r} makes" for made in {step.name, *step.makes}}


def _check_references(step: Step, sources: Mapping[str, Source], steps: Sequence[Step]) -> None:
    made = {name: kind for other in steps for name, kind in other.makes.items()}
    every = {other.name for other in steps}
    for key, listed in step.inputs.items():
        seen: dict[str, str] = {}
        for name in listed:
            same = seen.setdefault(str(sources[name]), name) if name in sources else name
            if same != name:
                raise step.place.at(*key.split(".")).error(f"{same!r} and {name!r} are the same source")
    for taken, name in step.takes():
        place = step.place.at(*taken.key.split("."))
        if name in every and name not in made:
            raise place.error(f"the step {name!r} makes no artifact", hint=f"to wait for it, write needs: [{name}]")
        if name not in made and name not in sources:
            raise place.error(f"no source or step named {name!r}", hint=nearest(name, {*sources, *made}))
        if name in made and not taken.takes_outputs:
            raise place.error(f"{name!r} is the output of a step, and so has a manifest", hint="use it as it is")
        if taken.takes == "file" and (name in made or sources[name].repo is not None):
            raise place.error(f"{name!r} is a folder; expected a file", hint="name a source that is a file")
        kind = made.get(name)
        if kind is not None:
            check_kind(kind, taken.takes, name, place)
    for name in step.needs:
        if name not in every:
            raise step.place.at("needs").error(f"no step named {name!r}", hint=nearest(name, every, "known steps"))


def _check_used(sources: Mapping[str, Source], steps: Sequence[Step]) -> None:
    used = {name for step in steps for _, name in step.takes()}
    unused = next((source for name, source in sources.items() if name not in used), None)
    if unused is not None:
        raise unused.place.error("no step uses this source", hint="remove it, or name it in a step")


def _check_targets(steps: Sequence[Step]) -> None:
    """Reject two steps that publish to the same tag (the second would fail) or branch (it would undo the first)."""
    seen: dict[tuple[str, str, str], Step] = {}
    for step in steps:
        if not step.how.publishes:
            continue
        options = step.options
        for key, value in (("tag", options.tag), ("branch", None if options.pull_request else options.branch)):
            other = seen.setdefault((key, options.repo.casefold(), value), step) if value is not None else step
            if other is not step:
                raise step.place.at(key).error(
                    f"{other.name!r} already publishes to the {key} {value} of {options.repo}",
                    hint=f"choose another {key}",
                )


def _check_own_sources(sources: Iterable[Source], steps: Sequence[Step]) -> None:
    """Reject a step that publishes to a branch that a source is read from: the next run would start from its result."""
    for step in steps:
        if not step.how.publishes or step.options.pull_request:
            continue
        target = step.options.repo.casefold(), step.options.branch
        for source in sources:
            if source.repo is not None and (source.repo.casefold(), source.revision or "main") == target:
                raise step.place.at("repo").error(
                    f"publishing to the branch {step.options.branch} of {source.repo} replaces the source "
                    f"{source.name!r}, and the next run would start from what this one made",
                    hint="publish to another repo or branch, or give the source a commit as its revision",
                )


def _guarded(recipe: Recipe, step: Step) -> Step:
    """Return the step; if it publishes, it also waits for every gate, except gates that wait for it."""
    if not step.how.publishes:
        return step
    gates = [other.name for other in recipe.steps.values() if other.how.gates(other.options)]
    gates = [name for name in gates if step not in recipe.until(name)]
    return replace(step, needs=tuple(dict.fromkeys([*step.needs, *gates])))


def _ordered(recipe: Recipe) -> dict[str, Step]:
    """Sort the steps, by name: each comes after those that it waits for, and steps that publish last if possible."""
    waiting = sorted(recipe.steps.values(), key=lambda step: step.how.publishes)
    ordered: dict[str, Step] = {}
    while waiting:
        ready = next((step for step in waiting if set(recipe.before(step)) <= set(ordered)), None)
        if ready is None:
            raise waiting[0].place.error(
                f"waits for itself: {' -> '.join(_cycle(recipe, waiting, ordered))}",
                hint="remove one of these dependencies",
            )
        ordered[ready.name] = ready
        waiting.remove(ready)
    return ordered


def _cycle(recipe: Recipe, waiting: Sequence[Step], done: Mapping[str, Step]) -> list[str]:
    path = [waiting[0].name]
    while path[-1] not in path[:-1]:
        path.append(next(name for name in recipe.before(recipe.steps[path[-1]]) if name not in done))
    return path[path.index(path[-1]) :]
