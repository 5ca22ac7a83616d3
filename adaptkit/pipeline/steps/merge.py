"""Merge adapters into a 16-bit checkpoint."""

from adaptkit.formats._format import writable
from adaptkit.operations._terms import weights_of
from adaptkit.operations.merge import NOTHING_MOVED, merge
from adaptkit.operations.options import MergeOptions
from adaptkit.pipeline.steps._kind import Input, Inputs, Outcome, StepKind, Work
from adaptkit.wording import counted


def _run(work: Work) -> Outcome:
    report = merge(work.path("merge"), work.paths["adapters"], work.output, work.options, progress=work.progress)
    for text in report.notes:
        work.note(text)
    facts = {"base_verified": report.base_verified, "relative_delta": report.relative_delta, "effect": report.effect}
    kept = f"{100 * (report.effect or 0):.3g} % of the change kept"
    if not report.moved:
        kept = f"but {NOTHING_MOVED}"
    return Outcome(f"{report.merged} of {counted(report.tensors, 'tensor')} changed, {kept}", facts)


def _validate(options: MergeOptions, inputs: Inputs) -> None:
    weights_of(inputs["adapters"], options.weights)


KIND = StepKind(
    inputs=(
        Input("merge", required=True, takes="unquantized checkpoint"),  # a 16-bit base beside it would be no input
        Input("adapters", many=True, required=True, takes="adapter"),
    ),
    options=MergeOptions,
    run=_run,
    validate=_validate,
    refused=dict.fromkeys(
        ("onto", "calibrate"), "merge into the 16-bit checkpoint; to get codes from text, add a quantize step"
    )
    | {"text": "add an evaluate step"},
    makes=lambda options: {"": "quantized checkpoint" if options.format in writable() else "unquantized checkpoint"},
)
