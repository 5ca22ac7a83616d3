"""Selection of a model's modules by a user's shell patterns."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from adaptkit.errors import UsageError
from adaptkit.models.kinds import is_indexer, is_never_called, is_read_by_kernels, is_router

EVERYTHING = "*"
_KIND = "linear layer besides the output layer"


def matches_any(paths: Iterable[str], pattern: str) -> bool:
    """Whether a shell pattern matches any of the dotted paths by which one module is known, as a whole."""
    return any(fnmatchcase(path, pattern) for path in paths)


def require_matches(option: str, patterns: Iterable[str], modules: Sequence[Sequence[str]], example: str) -> None:
    """Refuse a shell pattern that matches no module.

    Args:
        option: that gives the patterns.
        patterns: of whole paths.
        modules: the paths by which each module is known.
        example: a path that a pattern would usually match.

    Raises:
        UsageError: names the pattern.
    """
    for pattern in patterns:
        if not any(matches_any(paths, pattern) for paths in modules):
            hint = f"patterns match whole module paths, such as {example!r}"
            if any(matches_any(paths, f"*.{pattern}") for paths in modules):
                hint = f"patterns match whole module paths; write '*.{pattern}'"
            raise UsageError(f"{option} {pattern!r} matches no module", hint=hint)


def matching(what: str, patterns: Sequence[str], names: Iterable[str], kind: str) -> set[str]:
    """Return the dotted paths that any of the patterns matches, as a whole or in their last part.

    Args:
        what: name of the option, for the error message.
        patterns: shell patterns.
        names: dotted paths.
        kind: what the paths are, for the error message.

    Raises:
        UsageError: a pattern matches none.
    """
    names, chosen = list(names), set()
    for pattern in patterns:
        matched = {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.rpartition(".")[2], pattern)}
        if not matched:
            known = sorted({name.rpartition(".")[2] for name in names})
            there = f"available: {', '.join(known)}" if known else "the model has none"
            raise UsageError(f"the {what} {pattern!r} matches no {kind}", hint=there)
        chosen |= matched
    return chosen


def matching_targets(patterns: Sequence[str], names: Iterable[str], inside: str = "", model_type: str = "") -> set[str]:
    """Return the linear layers that get an adapter.

    ``*`` means all linear layers of the text part except routers, which choose experts and often have fewer rows than
    the rank; indexers, which no gradient reaches; and layers that peft refuses or bypasses. These, and layers of a
    vision part, get an adapter only if another pattern matches them.

    Args:
        patterns: shell patterns of the targets.
        names: dotted paths of all linear layers of the model.
        inside: dotted path of the text part; see ``architecture.language_part``.
        model_type: ``model_type`` of the configuration; see ``kinds.is_read_by_kernels`` and ``is_never_called``.

    Raises:
        UsageError: a pattern matches none.
    """
    names = list(names)
    chosen = matching("target", patterns, names, _KIND)
    if EVERYTHING in patterns:
        named = matching("target", [pattern for pattern in patterns if pattern != EVERYTHING], names, _KIND)
        begin = f"{inside}." if inside else ""
        others = {name for name in names if is_router(name) or is_read_by_kernels(model_type, name)}
        others |= {name for name in names if is_indexer(name) or is_never_called(model_type, name)}
        chosen -= (others | {name for name in names if not name.startswith(begin)}) - named
    return chosen
