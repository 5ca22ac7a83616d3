"""Dequantize a checkpoint."""

from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.options import DequantizeOptions
from adaptkit.pipeline.steps._kind import Input, Outcome, StepKind, Work
from adaptkit.wording import counted, size


def _run(work: Work) -> Outcome:
    report = dequantize(work.path("dequantize"), work.output, work.options, progress=work.progress)
    left_out = f"; left out {counted(report.input_scales, 'scale')} of 8-bit inputs" if report.input_scales else ""
    return Outcome(f"{counted(report.dequantized, 'matrix')}, {size(report.bytes_after)}{left_out}", {})


KIND = StepKind(
    inputs=(Input("dequantize", required=True, takes="quantized checkpoint"),),
    options=DequantizeOptions,
    run=_run,
    makes=lambda options: {"": "unquantized checkpoint"},
)
