"""Extract an adapter from a tuned checkpoint and its base."""

from adaptkit.operations.extract import extract
from adaptkit.operations.options import ExtractOptions
from adaptkit.pipeline.steps._kind import Input, Outcome, StepKind, Work
from adaptkit.wording import counted


def _run(work: Work) -> Outcome:
    report = extract(work.path("extract"), work.path("base"), work.output, work.options, progress=work.progress)
    for label, text in report.remarks.items():
        work.note(f"{label}: {text}")
    if report.left_out:
        work.note(f"left out: {counted(len(report.left_out), 'tensor')} that differ, such as {report.left_out[0].name}")
    figure = f"{report.parameters:,} parameters, {100 * report.energy_kept:.3g} % of the low-rank change kept"
    return Outcome(figure, {"relative_error": report.relative_error})


KIND = StepKind(
    inputs=(
        Input("extract", required=True, takes="unquantized checkpoint"),
        Input("base", required=True, takes="unquantized checkpoint"),
    ),
    options=ExtractOptions,
    run=_run,
    makes=lambda options: {"": "adapter"},
)
