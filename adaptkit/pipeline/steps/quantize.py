"""Quantize a checkpoint; with calibration, choose constants and codes by text, and optionally make an init adapter."""

from dataclasses import replace
from typing import Any

from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.pipeline.artifact import Kind
from adaptkit.pipeline.steps._kind import Input, Inputs, Outcome, StepKind, Work
from adaptkit.wording import size

_FILES = "calibration.files"


def _run(work: Work) -> Outcome:
    options: QuantizeOptions = work.options
    if options.calibration is not None:
        options = replace(options, calibration=replace(options.calibration, files=work.paths[_FILES]))
    report = quantize(work.path("quantize"), work.output, options, progress=work.progress)
    figure = f"{size(report.bytes_before)} -> {size(report.bytes_after)}"
    facts = {"bits_per_parameter": report.bits_per_parameter, "relative_error": report.relative_error}
    return Outcome(figure, facts)


def _makes(options: QuantizeOptions) -> dict[str, Kind | None]:
    has_companion = options.calibration is not None and options.calibration.init_rank is not None
    return {"": "quantized checkpoint", **({"-init": "adapter"} if has_companion else {})}


def _complete(values: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    if _FILES in inputs:
        values["calibration"] = {**values["calibration"], "files": ["."]}
    return values


KIND = StepKind(
    inputs=(
        Input("quantize", required=True, takes="unquantized or released checkpoint"),
        Input(_FILES, many=True, takes="file"),
    ),
    options=QuantizeOptions,
    run=_run,
    complete=_complete,
    makes=_makes,
    needs_transformers=lambda options: options.calibration is not None,
)
