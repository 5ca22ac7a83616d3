"""Reduce the rank of an adapter."""

from adaptkit.operations.options import ResizeOptions
from adaptkit.operations.resize import resize
from adaptkit.pipeline.steps._kind import Input, Outcome, StepKind, Work


def _run(work: Work) -> Outcome:
    report = resize(work.path("resize"), work.output, work.options)
    for text in report.notes:
        work.note(text)
    figure = f"{report.parameters_before:,} -> {report.parameters:,} parameters"
    return Outcome(figure, {"ranks": list(report.ranks), "relative_error": report.relative_error})


KIND = StepKind(
    inputs=(Input("resize", required=True, takes="adapter"),),
    options=ResizeOptions,
    run=_run,
    makes=lambda options: {"": "adapter"},
)
