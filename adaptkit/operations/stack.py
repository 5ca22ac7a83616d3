"""Combine adapters into one adapter."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from adaptkit.arguments import AnyPath, as_path, as_paths, check_flags, checked_options
from adaptkit.checkpoint.adapter import Adapter, read_adapter, require_plain
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import tensors_root
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.vocabulary import is_head
from adaptkit.discovery import load
from adaptkit.errors import AdapterError, NonFiniteError, UsageError
from adaptkit.numerics import lora, stacking
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._compress import Compressed, Limit, compress
from adaptkit.numerics.stacking._method import Method
from adaptkit.operations._carried import base_names, collect_carried, left_out, publish_adapter
from adaptkit.operations._terms import expected_fingerprints, given_again, refuse_compensation, weights_of
from adaptkit.operations._threads import map_in_threads, thread_count
from adaptkit.operations.options import StackOptions


@dataclass(frozen=True)
class StackedModule:
    """The result for one module.

    Attributes:
        module: dotted path.
        adapters: number of adapters that change it.
        rank: in the result.
        norm: ‖Δ‖ of the method's result, before its rank is limited.
        energy_kept: share of ‖Δ‖² that this rank keeps.
    """

    module: str
    adapters: int
    rank: int
    norm: float
    energy_kept: float


@dataclass(frozen=True)
class StackReport:
    """What was done, or would be in a dry run.

    Attributes:
        output: folder.
        method: name of the stacking method.
        settings: the method's own options, defaults included.
        adapters: number of adapters.
        modules: number of modules in the result.
        partial: number of modules that only some adapters change; the others count as a change of zero there.
        zero: number of modules whose result is zero.
        ranks: smallest and largest rank of a module in the result.
        energy_kept: share of Σ ‖Δ‖² over all modules that the result keeps.
        base_copies: names of the base's tensors that the adapters, and so the result, contain copies of, as peft saves
            embeddings.
        tokenizer: names of the tokenizer, chat template and generation config files that are copied to the result.
        base_names: names of the base in the adapters' configurations.
        per_module: one per module, sorted by name.
        tensors_root: hash of the result's tensors; None for a dry run.
        manifest_sha256: of the result's manifest; None for a dry run.
        notes: adapters given several times, modules whose changes cancel, value heads that are left out.
    """

    output: str
    method: str
    settings: dict[str, float]
    adapters: int
    modules: int
    partial: int
    zero: int
    ranks: tuple[int, int]
    energy_kept: float
    base_copies: tuple[str, ...]
    tokenizer: tuple[str, ...]
    base_names: tuple[str, ...]
    per_module: tuple[StackedModule, ...] = field(repr=False)
    tensors_root: str | None = None
    manifest_sha256: str | None = None
    notes: tuple[str, ...] = ()


def stack(
    adapters: AnyPath | Sequence[AnyPath],
    output: AnyPath,
    options: StackOptions | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> StackReport:
    """Write one adapter that combines several.

    Args:
        adapters: folders, at least two, in order.
        output: folder to make.
        options: see ``StackOptions``.
        force: replace an existing output.
        dry_run: compute the report without writing anything.
        progress: called with modules combined.

    Raises:
        AdapterError: the adapters do not fit together, or one contains more than low-rank changes.
        BaseMismatchError: they were trained on different bases.
        UsageError: fewer than two adapters, a wrong number of weights, or every module's result is zero.
        NonFiniteError: the result is too large for float32.
        OutputExistsError: the output exists.
    """
    check_flags(force=force, dry_run=dry_run)
    output = as_path(output, "output")
    adapters = as_paths(adapters, "adapters")
    options = checked_options(options, StackOptions)
    if len(adapters) < 2:
        raise UsageError("stack needs at least two adapters", hint="adaptkit stack ADAPTER ADAPTER... -o OUT")
    read = [read_adapter(path) for path in adapters]
    weights = weights_of(read, options.weights)
    expected_fingerprints(read, hint="stack adapters of the same base")
    changes = _matched(read, weights)
    check_output(output, force, adapters)
    carried = collect_carried(read)
    combined = _combine(changes, options, progress)
    entries = tuple(
        StackedModule(name, sum(term.rank > 0 for term in changes[name]), made.term.rank, made.norm, made.energy)
        for name, made in combined.items()
    )
    ranks = [entry.rank for entry in entries]
    total = math.fsum(entry.norm**2 for entry in entries)
    lost = math.fsum((1 - entry.energy_kept) * entry.norm**2 for entry in entries)
    notes = [*given_again(read)]
    if cancelled := [name for name, made in combined.items() if made.cancels]:
        where = "every module" if len(cancelled) == len(entries) else f"{len(cancelled)} of {len(entries)} modules"
        notes.append(f"the changes cancel in {where}, such as {cancelled[0]}, where the result is only rounding")
    report = StackReport(
        output=str(output),
        method=options.method,
        settings=options.own_settings(),
        adapters=len(read),
        modules=len(entries),
        partial=sum(any(name not in adapter.modules for adapter in read) for name in combined),
        zero=sum(made.is_zero for made in combined.values()),
        ranks=(min(ranks), max(ranks)),
        energy_kept=1 - lost / total if total else 1.0,
        base_copies=tuple(sorted(carried.copies)),
        tokenizer=tuple(sorted(carried.files)),
        base_names=base_names(read),
        per_module=entries,
        notes=(*notes, *left_out(read)),
    )
    if dry_run:
        return report
    recorded = options.recorded(weights)
    plan = [[tensors_root(adapter.records) for adapter in read], carried.identity(), recorded]
    modules = {name: made.term for name, made in combined.items()}
    with Output(output, plan, force) as out:
        manifest = publish_adapter(out, {"name": "stack", "options": recorded}, read, weights, modules, carried)
    return replace(report, tensors_root=manifest.tensors_root, manifest_sha256=manifest.sha256)


def _matched(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, tuple[LowRank, ...]]:
    """Return each module's weighted changes in the order of the adapters, of rank 0 if one has none.

    Raises:
        AdapterError: an adapter contains more than low-rank changes, or the adapters do not fit together.
        NonFiniteError: a weighted change is too large for float32.
    """
    for adapter in adapters:
        require_plain(adapter, "stack")
        instead = "merge it into the 16-bit base instead"
        refuse_compensation(adapter, "whose correction must not be added twice", instead)
        _check_compatible(adapter, adapters[0])
    changes = {}
    for name in sorted({name for adapter in adapters for name in adapter.modules}):
        known = next(adapter for adapter in adapters if name in adapter.modules)
        shape = out, columns = known.modules[name].shape
        nothing = LowRank(np.zeros((0, columns), np.float32), np.zeros((out, 0), np.float32), 1.0)
        terms = []
        for adapter, weight in zip(adapters, weights, strict=True):
            term = adapter.modules.get(name, nothing).weighted(weight)
            if term.shape != shape:
                raise AdapterError(
                    f"{name}: shape {list(shape)} in {known.root}, but {list(term.shape)} in {adapter.root}",
                    hint="stack adapters of the same base",
                )
            if name in adapter.modules and (name in adapter.embeddings) != (name in known.embeddings):
                linear = known if name in adapter.embeddings else adapter
                raise AdapterError(
                    f"{name}: an embedding in one adapter, but a linear layer in {linear.root}",
                    hint="stack adapters of the same base",
                )
            if not lora.norm(term) <= np.finfo(np.float32).max:  # also true if it is NaN
                raise NonFiniteError(
                    f"{name}: the change of {adapter.root}, times {weight:g}, is too large for float32",
                    hint="use a smaller --weight",
                )
            terms.append(term)
        changes[name] = tuple(terms)
    return changes


def _check_compatible(adapter: Adapter, first: Adapter) -> None:
    plain = first if adapter.fan_in_fan_out else adapter
    # peft writes the value of the last layer that it adapted: for a base with Conv1D, false if that was the head.
    if adapter.fan_in_fan_out != first.fan_in_fan_out and not any(map(is_head, plain.modules)):
        raise AdapterError(
            f"{adapter.root} and {first.root} are for bases that store weights differently (fan_in_fan_out)",
            hint="stack adapters of the same base",
        )
    tied, expected = (bool(found.config.get("ensure_weight_tying")) for found in (adapter, first))
    if tied != expected and (adapter.embeddings or first.embeddings):
        raise AdapterError(
            f"{adapter.root} and {first.root}: only one of them changes the tied head together with the embedding "
            "(ensure_weight_tying)",
            hint="merge one adapter after the other instead",
        )


def _combine(
    changes: Mapping[str, tuple[LowRank, ...]], options: StackOptions, progress: Progress
) -> dict[str, Compressed]:
    """Combine the changes of each module; return the results by module name."""
    method: Method = load(stacking, options.method, "METHOD")
    settings, limit = options.resolved(), Limit(options.rank, options.energy)
    largest = max(term.rank for terms in changes.values() for term in terms)

    def combine(name: str) -> Compressed:
        terms = changes[name]
        try:
            return compress(method.combine(terms, settings, name), terms, method.length, limit, largest)
        except NonFiniteError as error:
            raise NonFiniteError(f"{name}: {error.message}", error.hint) from error

    combined = {}
    for name, made in zip(changes, map_in_threads(combine, changes, thread_count(options.threads)), strict=True):
        combined[name] = made
        progress(len(combined), len(changes))
    if all(made.is_zero for made in combined.values()):
        raise UsageError(
            f"nothing is left of any module: the changes cancel out, or {options.method} drops them all",
            hint="check each --weight, and that the adapters were trained",
        )
    return combined
