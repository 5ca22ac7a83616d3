"""Extract an adapter from a tuned checkpoint and its base."""

from adaptkit.operations.extract import ExtractOptions, extract
from adaptkit.pipeline.steps._kind import Input, Outcome, StepKind, Work


def _run(work: Work) -> Outcome:
    report = extract(work.path("extract"), work.path("base"), work.output, work.options, progress=work.progress)
    return Outcome(f"{report.parameters:,} parameters", {"relative_error": report.relative_error})


KIND = StepKind(
    inputs=(
        Input("extract", required=True, takes="unquantized checkpoint"),
        Input("base", required=True, takes="unquantized checkpoint"),
    ),
    options=ExtractOptions,
    run=_run,
    makes=lambda options: {"": "adapter"},
)
