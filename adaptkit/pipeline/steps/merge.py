"""Merge adapters into a 16-bit checkpoint."""

from adaptkit.checkpoint.progress import counted
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.pipeline.steps._kind import Input, Inputs, Outcome, StepKind, Work, check_weights


def _run(work: Work) -> Outcome:
    report = merge(work.path("merge"), work.paths["adapters"], work.output, work.options, progress=work.progress)
    for text in report.told:
        work.note(text)
    facts = {"base_verified": report.base_verified, "relative_delta": report.relative_delta, "effect": report.effect}
    kept = f"{100 * (report.effect or 0):.3g} % of the change kept"
    if not report.moved:
        kept = "but no weight moved: the result is the base"
    return Outcome(f"{report.merged} of {counted(report.tensors, 'tensor')} changed, {kept}", facts)


def _check(options: MergeOptions, inputs: Inputs) -> None:
    check_weights(options.weights, inputs["adapters"])


KIND = StepKind(
    inputs=(
        Input("merge", required=True, takes="unquantized checkpoint"),  # a 16-bit base beside it would be no input
        Input("adapters", many=True, required=True, takes="adapter"),
    ),
    options=MergeOptions,
    run=_run,
    check=_check,
    makes=lambda options: {"": "unquantized checkpoint" if options.format == "keep" else "quantized checkpoint"},
)
