"""Extract an adapter from a tuned checkpoint: its difference from the base, as low-rank matrices and whole tensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptkit.arguments import AnyPath, as_path, check_flags, checked_options
from adaptkit.checkpoint.adapter import write_adapter
from adaptkit.checkpoint.integrity import read_input_manifest
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import GENERATION_NAME, name_of, read_small
from adaptkit.checkpoint.manifest import Manifest, Target, TensorRecord, parent_of, read_manifest
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.side_files import side_files
from adaptkit.data.tokenizer_files import is_of_tokenizer
from adaptkit.errors import UsageError
from adaptkit.numerics.dtypes import Array
from adaptkit.operations._extract.plan import IMPOSSIBLE, LEFT_OUT, ExtractPlan, make_plan
from adaptkit.operations._extract.report import ExtractedModule, ExtractReport, OtherTensor, make_report
from adaptkit.operations._extract.saved import SavedTensors, placeholder_part, running_model, whole_tensors, zero_change
from adaptkit.operations._extract.tensors import ComparedTensor, examine
from adaptkit.operations._threads import map_in_threads, thread_count
from adaptkit.operations.options import ExtractOptions
from adaptkit.wording import counted

__all__ = ["ExtractOptions", "ExtractReport", "ExtractedModule", "OtherTensor", "extract"]


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
        read_input_manifest(source.root)
    check_output(output, force, [tuned, base])
    plan = make_plan(*sources, options)
    beside = _files_beside(plan)
    if dry_run:
        return make_report(output, plan)
    recorded = options.recorded()
    with Output(output, [[source.outline() for source in sources], recorded], force, inputs=sources) as out:
        findings = _examine_all(plan, options, progress)
        out.require_inputs()
        running = running_model(plan.base)
        saved = whole_tensors(plan, findings, running)
        findings = [saved.seen(finding) for finding in findings]
        terms = {running.module(finding.part): finding.term for finding in findings if finding.term is not None}
        placeholder = None if terms else placeholder_part(plan, saved, running)
        if placeholder is not None:
            terms[running.module(placeholder)] = zero_change(placeholder)
        config = saved.config | {"fan_in_fan_out": plan.transposed, "task_type": running.task}
        write_adapter(out, terms, name_of(plan.base.root), saved=_read_whole(plan, findings, saved), **config)
        for name, path in beside.items():
            out.write(name, read_small(path))
        manifest = _manifest(out, plan, findings, saved, recorded)
        out.publish(manifest)
    return make_report(output, plan, findings, placeholder.module if placeholder else None, beside, manifest)


def _examine_all(plan: ExtractPlan, options: ExtractOptions, progress: Progress) -> list[ComparedTensor]:
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


def _read_whole(plan: ExtractPlan, findings: Sequence[ComparedTensor], saved: SavedTensors) -> dict[str, Array]:
    """Read the tensors that are stored whole, by name in the adapter; a tied one has two names, but is read once.

    What is stored only because peft saves its module stays the base's, without the rounding of a 16-bit file.
    """
    kept = {finding.part.name for finding in findings if not finding.differs or finding.part.fate == LEFT_OUT}
    names = {part.name for part in saved.parts.values()}
    values = {name: (plan.base if name in kept else plan.tuned).read(name) for name in names}
    return {name: values[part.name] for name, part in saved.parts.items()}


def _files_beside(plan: ExtractPlan) -> dict[str, Path]:
    """Map names to the tuned tokenizer's files and the generation config, if they differ from the base's."""
    found = side_files(plan.tuned.root, lambda name: is_of_tokenizer(name) or name == GENERATION_NAME)
    changed = {name for name, path in found.items() if not _same_bytes(path, plan.base.root / name)}
    replaces_tokenizer = any(map(is_of_tokenizer, changed))
    return {n: path for n, path in found.items() if n in changed or (replaces_tokenizer and is_of_tokenizer(n))}


def _manifest(
    out: Output, plan: ExtractPlan, findings: Sequence[ComparedTensor], saved: SavedTensors, recorded: dict[str, Any]
) -> Manifest:
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


def _same_bytes(one: Path, other: Path) -> bool:
    return other.is_file() and read_small(one) == read_small(other)
