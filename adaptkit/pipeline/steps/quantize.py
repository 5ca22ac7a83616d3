"""Quantize a checkpoint; with calibration, choose constants and codes by text, and optionally make an init adapter."""

from adaptkit.operations.options import QuantizeOptions
from adaptkit.operations.quantize import quantize
from adaptkit.pipeline.artifact import Kind
from adaptkit.pipeline.steps._kind import Input, Outcome, StepKind, Work
from adaptkit.wording import size


def _run(work: Work) -> Outcome:
    report = quantize(work.path("quantize"), work.output, work.options, progress=work.progress)
    figure = f"{size(report.bytes_before)} -> {size(report.bytes_after)}"
    facts = {"bits_per_parameter": report.bits_per_parameter, "relative_error": report.relative_error}
    return Outcome(figure, facts)


def _makes(options: QuantizeOptions) -> dict[str, Kind | None]:
    has_companion = options.calibration is not None and options.calibration.init_rank is not None
    return {"": "quantized checkpoint", **({"-init": "adapter"} if has_companion else {})}


KIND = StepKind(
    inputs=(
        Input("quantize", required=True, takes="unquantized or released checkpoint"),
        Input("calibration.files", field="calibration.files", many=True, takes="file"),
    ),
    options=QuantizeOptions,
    run=_run,
    makes=_makes,
)
