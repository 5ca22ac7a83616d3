"""Extract an adapter from a tuned checkpoint: its difference from the base, as low-rank matrices and whole tensors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptkit.arguments import AnyPath, as_path, check_flags, checked_options
from adaptkit.checkpoint.adapter import write_adapter
from adaptkit.checkpoint.integrity import check_config
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import GENERATION_NAME, name_of, read_small
from adaptkit.checkpoint.manifest import Manifest, Target, TensorRecord, parent_of, read_manifest
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, counted, no_progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.side_files import side_files
from adaptkit.errors import UsageError
from adaptkit.operations._discard import discard_on_bad_input
from adaptkit.operations._extract.plan import IMPOSSIBLE, LEFT_OUT, SAVED, ExtractOptions, Part, Plan, make_plan
from adaptkit.operations._extract.report import (
    LOW_ENERGY,
    ExtractedModule,
    ExtractReport,
    OtherTensor,
    module_report,
    other_report,
    plan_report,
    weighted,
)
from adaptkit.operations._extract.saved import (
    Running,
    Saved,
    placeholder_part,
    running_model,
    whole_tensors,
    zero_change,
)
from adaptkit.operations._extract.tensors import Finding, examine
from adaptkit.operations._threads import map_in_threads, thread_count
from adaptkit.text.tokenizer_files import is_of_tokenizer

__all__ = ["ExtractOptions", "ExtractReport", "ExtractedModule", "OtherTensor", "extract"]

_IGNORED_KEYS = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip
"""Keys of ``config.json`` that do not affect what the model computes, or that other fields of the report cover."""


def extract(
    tuned: AnyPath,
    base: AnyPath,
    output: AnyPath,
    options: ExtractOptions,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> ExtractReport:
    """Write the adapter that turns a base into a tuned checkpoint, as closely as its rank allows.

    For a linear layer's weight, store a low-rank approximation of its change, by a randomized decomposition that reads
    both files in row blocks. Save every other tensor that differs whole.

    Args:
        tuned: folder of a plain checkpoint.
        base: folder of the plain checkpoint that it was made from.
        output: folder of the adapter to make.
        options: see ``ExtractOptions``.
        force: replace an existing output.
        dry_run: plan and validate only.
        progress: called with bytes of both checkpoints, each counted when it is first read.

    Raises:
        BaseMismatchError: names or shapes of tensors differ, or dtypes of which one is not a supported float.
        CheckpointError: malformed or quantized input.
        IntegrityError: a config.json does not match its folder's manifest.
        NonFiniteError: a weight is NaN or infinite; names the tensor.
        UsageError: nothing differs, or a tensor differs that an adapter cannot store.
        OutputExistsError: the output exists.

    Source: Halko, Martinsson and Tropp (arXiv:0909.4061); see ``numerics.randomized`` for the variant.
    """
    check_flags(force=force, dry_run=dry_run)
    tuned, base, output = as_path(tuned, "tuned"), as_path(base, "base"), as_path(output, "output")
    options = checked_options(options, ExtractOptions)
    sources = (Checkpoint(tuned), Checkpoint(base))
    for source in sources:
        check_config(source.root, read_manifest(source.root))
    states = [source.state() for source in sources]
    check_output(output, force, [tuned, base])
    plan = make_plan(*sources, options)
    beside = _files_beside(plan)
    report = plan_report(output, plan, _config_differs(plan))
    if dry_run:
        return report
    recorded = options.recorded()
    inputs = [[str(source.root.resolve()), state] for source, state in zip(sources, states, strict=True)]
    with (
        Output(output, [[source.outline() for source in sources], recorded], force, inputs=inputs) as out,
        discard_on_bad_input(out),
    ):
        findings = _examine_all(plan, options, progress)
        for source, state in zip(sources, states, strict=True):
            source.require_state(state)
        running = running_model(plan.base)
        saved = whole_tensors(plan, findings, running)
        findings = [saved.seen(finding) for finding in findings]
        placeholder = None if any(f.term for f in findings) else placeholder_part(plan, saved, running)
        _write(out, plan, findings, running, saved, placeholder, beside)
        manifest = _manifest(out, plan, findings, saved, recorded)
        out.publish(manifest)
    return replace(
        _with_findings(report, findings),
        placeholder=placeholder.module if placeholder else None,
        tokenizer=tuple(beside),
        tensors_root=manifest.tensors_root,
        manifest_sha256=manifest.sha256,
    )


def _examine_all(plan: Plan, options: ExtractOptions, progress: Progress) -> list[Finding]:
    """Compare every tensor, and refuse differences that no adapter can store."""
    total = sum(part.spec.nbytes + part.tuned.nbytes for part in plan.parts)
    done, findings = 0, []
    progress(done, total)
    for finding in map_in_threads(lambda part: examine(plan, part, options), plan.parts, thread_count(options.threads)):
        if finding.differs and finding.part.fate == IMPOSSIBLE:
            raise UsageError(
                f"{plan.tuned.root}: {finding.part.name} ({finding.part.why}) differs, but an adapter cannot store "
                "such a tensor",
                hint="leave it out with --only-linear",
            )
        findings.append(finding)
        done += finding.part.spec.nbytes + finding.part.tuned.nbytes
        progress(done, total)
    if not any(finding.differs for finding in findings):
        raise UsageError(
            f"{plan.tuned.root} and {plan.base.root} hold the same weights, so there is nothing to extract",
            hint="give the tuned checkpoint first, then its base",
        )
    if all(finding.part.fate == LEFT_OUT for finding in findings if finding.differs):
        raise UsageError(
            f"{plan.tuned.root}: everything that differs would be left out "
            f"({counted(sum(finding.differs for finding in findings), 'tensor')})",
            hint="change --target, or leave out --only-linear",
        )
    return findings


def _write(
    out: Output,
    plan: Plan,
    findings: Sequence[Finding],
    running: Running,
    saved: Saved,
    placeholder: Part | None,
    beside: Mapping[str, Path],
) -> None:
    """Write the adapter and the files beside it."""
    terms = {running.module(finding.part): finding.term for finding in findings if finding.term is not None}
    if placeholder is not None:
        terms[running.module(placeholder)] = zero_change(placeholder)
    config = saved.config | {"fan_in_fan_out": plan.transposed, "task_type": running.task}
    # What is stored only because peft saves its module stays the base's, without the rounding of a 16-bit file.
    kept = {finding.part.name for finding in findings if not finding.differs or finding.part.fate == LEFT_OUT}
    names = {part.name for part in saved.parts.values()}  # a tied tensor has two names in the adapter, but is read once
    values = {name: (plan.base if name in kept else plan.tuned).read(name) for name in names}
    tensors = {name: values[part.name] for name, part in saved.parts.items()}
    write_adapter(out, terms, name_of(plan.base.root), saved=tensors, **config)
    for name, path in beside.items():
        out.write(name, read_small(path))


def _files_beside(plan: Plan) -> dict[str, Path]:
    """Map names to the tuned tokenizer's files and the generation config, if they differ from the base's."""
    found = side_files(plan.tuned.root, lambda name: is_of_tokenizer(name) or name == GENERATION_NAME)
    changed = {name for name, path in found.items() if not _same_bytes(path, plan.base.root / name)}
    replaces_tokenizer = any(map(is_of_tokenizer, changed))
    return {n: path for n, path in found.items() if n in changed or (replaces_tokenizer and is_of_tokenizer(n))}


def _manifest(out: Output, plan: Plan, findings: Sequence[Finding], saved: Saved, recorded: dict[str, Any]) -> Manifest:
    base = [TensorRecord.of(f.part.spec, f.base_digest) for f in findings]
    tuned = [TensorRecord.of(f.part.tuned, f.tuned_digest) for f in findings]
    whole = {part.name for part in saved.parts.values()}
    touched = [f for f in findings if (f.differs and f.part.fate != LEFT_OUT) or f.part.name in whole]
    return Manifest(
        kind="adapter",
        operation={"name": "extract", "options": recorded},
        files=tuple(out.files),
        tensors=tuple(out.tensors),
        parents=(
            parent_of("base", read_manifest(plan.base.root), base, root=plan.base.root),
            parent_of("tuned", read_manifest(plan.tuned.root), tuned, root=plan.tuned.root),
        ),
        targets=tuple(Target(f.part.name.removesuffix(".weight"), f.part.spec.shape, f.base_digest) for f in touched),
    )


def _with_findings(report: ExtractReport, findings: Sequence[Finding]) -> ExtractReport:
    low_rank = [finding for finding in findings if finding.term is not None]
    others = [finding for finding in findings if finding.differs and finding.term is None]
    left_out = [finding for finding in others if finding.part.fate == LEFT_OUT]
    saved = [finding for finding in others if finding.part.fate == SAVED]
    ranks = [finding.term.rank for finding in low_rank if finding.term is not None] or [0]
    kept = weighted(low_rank, "energy_kept") if low_rank else 1.0
    total = sum(finding.square for finding in findings)
    factors = sum(f.term.rank * sum(f.term.shape) for f in low_rank if f.term is not None)
    return replace(
        report,
        equal=sum(not finding.differs for finding in findings),
        modules=tuple(module_report(finding) for finding in low_rank),
        experts=sum(finding.part.kind == "expert" for finding in low_rank),
        saved=tuple(other_report(finding) for finding in saved),
        left_out=tuple(other_report(finding) for finding in left_out),
        ranks=(min(ranks), max(ranks)),
        parameters=factors + sum(finding.part.tuned.count for finding in saved),
        energy_kept=kept,
        relative_error=math.sqrt(max(0.0, 1 - kept)),
        below_90=sum(finding.energy_kept < LOW_ENERGY for finding in low_rank),
        unreached=sum(not finding.reached for finding in low_rank),
        rounding=weighted(low_rank, "rounding"),
        left_out_energy=sum(finding.square for finding in left_out) / total if total else 0.0,
    )


def _config_differs(plan: Plan) -> tuple[str, ...]:
    before, after = plan.base.config, plan.tuned.config
    keys = sorted((set(before) | set(after)) - _IGNORED_KEYS)
    return tuple(key for key in keys if before.get(key) != after.get(key))


def _same_bytes(one: Path, other: Path) -> bool:
    return other.is_file() and read_small(one) == read_small(other)
