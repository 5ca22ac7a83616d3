"""Reduce the rank of an adapter to the best approximation of each module's change."""

import math
from dataclasses import dataclass, field, replace

from adaptkit.arguments import AnyPath, as_path, check_flags, checked_options
from adaptkit.checkpoint.adapter import read_adapter, require_plain
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import tensors_root
from adaptkit.checkpoint.place import check_output
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spectrum import rank_for_energy, svd
from adaptkit.operations._carried import collect_carried, left_out, publish_adapter
from adaptkit.operations._terms import refuse_compensation
from adaptkit.operations._threads import map_in_threads, thread_count
from adaptkit.operations.options import ResizeOptions


@dataclass(frozen=True)
class ResizedModule:
    """The result for one module.

    Attributes:
        module: dotted path.
        rank_before: in the adapter.
        rank: in the result.
        norm: ‖Δ‖ in the adapter.
        energy_kept: share of ‖Δ‖² in the result.
        relative_error: ‖Δ − result‖ / ‖Δ‖.
    """

    module: str
    rank_before: int
    rank: int
    norm: float
    energy_kept: float
    relative_error: float


@dataclass(frozen=True)
class ResizeReport:
    """What was done, or would be in a dry run.

    Attributes:
        output: folder.
        resized: number of modules with a smaller rank than before.
        unchanged: number of modules that keep their factors, byte for byte if these are in float32.
        below: number of modules whose own rank is below the one that was asked for.
        ranks: smallest and largest rank of a module in the result.
        parameters_before: in A and B of all modules of the adapter.
        parameters: the same in the result.
        energy_kept: share of Σ ‖Δ‖² in the result.
        relative_error: of all modules together.
        base_copies: names of the base's tensors that the adapter, and so the result, contains copies of, as peft saves
            embeddings.
        tokenizer: names of the tokenizer, chat template and generation config files that are copied to the result.
        modules: one per module.
        tensors_root: hash of the result's tensors; None for a dry run.
        manifest_sha256: None for a dry run.
        notes: a value head that is left out.
    """

    output: str
    resized: int
    unchanged: int
    below: int
    ranks: tuple[int, int]
    parameters_before: int
    parameters: int
    energy_kept: float
    relative_error: float
    base_copies: tuple[str, ...]
    tokenizer: tuple[str, ...]
    modules: tuple[ResizedModule, ...] = field(repr=False)
    tensors_root: str | None = None
    manifest_sha256: str | None = None
    notes: tuple[str, ...] = ()


def resize(
    adapter: AnyPath, output: AnyPath, options: ResizeOptions, *, force: bool = False, dry_run: bool = False
) -> ResizeReport:
    """Write an adapter whose modules have the wanted rank, or keep the wanted share of their squared norm.

    Each module's Δ = s · B A is decomposed in factored form, by two QR and one small SVD, and truncated: no other
    matrix of that rank is closer (Eckart and Young). Modules that need not shrink are not changed.

    Args:
        adapter: folder.
        output: folder to make.
        options: see ``ResizeOptions``.
        force: replace an existing output.
        dry_run: compute the report without writing anything.

    Raises:
        AdapterError: malformed, trained from a companion adapter, or not only low-rank changes.
        OutputExistsError: the output exists.
    """
    check_flags(force=force, dry_run=dry_run)
    adapter, output = as_path(adapter, "adapter"), as_path(output, "output")
    options = checked_options(options, ResizeOptions)
    read = read_adapter(adapter)
    require_plain(read, "resize")
    instead = "merge it into the 16-bit base, then extract an adapter from the result"
    refuse_compensation(read, "whose correction a smaller rank would destroy", instead)
    check_output(output, force, [adapter])
    carried = collect_carried([read])

    def shrunk(term: LowRank) -> tuple[LowRank, float, float]:
        """Return the resized change, ‖Δ‖², and the squared norm of what is cut off."""
        spectrum = svd(term)
        square = float(spectrum.sigma.square().sum())
        rank = options.rank if options.energy is None else rank_for_energy(spectrum.sigma, options.energy)
        rank = min(rank or term.rank, spectrum.sigma.numel())
        if rank >= term.rank:
            return term, square, 0.0
        return spectrum.truncated(rank), square, float(spectrum.sigma[rank:].square().sum())

    modules: dict[str, LowRank] = {}
    entries, total, lost = [], 0.0, 0.0
    results = map_in_threads(shrunk, read.modules.values(), thread_count(options.threads))
    for (name, before), (after, square, cut) in zip(read.modules.items(), results, strict=True):
        modules[name] = after
        share = cut / square if square else 0.0
        entries.append(ResizedModule(name, before.rank, after.rank, math.sqrt(square), 1 - share, math.sqrt(share)))
        total, lost = total + square, lost + cut
    ranks = [entry.rank for entry in entries]
    resized = sum(entry.rank < entry.rank_before for entry in entries)
    share = lost / total if total else 0.0
    report = ResizeReport(
        output=str(output),
        resized=resized,
        unchanged=len(entries) - resized,
        below=sum(entry.rank_before < (options.rank or 0) for entry in entries),
        ranks=(min(ranks), max(ranks)),
        parameters_before=sum(term.a.size + term.b.size for term in read.modules.values()),
        parameters=sum(term.a.size + term.b.size for term in modules.values()),
        energy_kept=1 - share,
        relative_error=math.sqrt(share),
        base_copies=tuple(sorted(carried.copies)),
        tokenizer=tuple(sorted(carried.files)),
        modules=tuple(entries),
        notes=left_out([read]),
    )
    if dry_run:
        return report
    recorded = options.recorded()
    plan = [tensors_root(read.records), dict(read.config), carried.identity(), recorded]
    with Output(output, plan, force) as out:
        manifest = publish_adapter(out, {"name": "resize", "options": recorded}, [read], [None], modules, carried)
    return replace(report, tensors_root=manifest.tensors_root, manifest_sha256=manifest.sha256)
