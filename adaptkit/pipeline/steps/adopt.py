"""Give an adapter or a checkpoint that another tool made a manifest."""

from adaptkit.operations.adopt import adopt, refuse_manifest
from adaptkit.operations.options import AdoptOptions
from adaptkit.pipeline.steps._kind import Input, Outcome, StepKind, Work


def _run(work: Work) -> Outcome:
    base = work.optional("base")
    report = adopt(work.path("adopt"), work.output, work.options, base=base, progress=work.progress)
    figure = f"{report.kind} with {report.tensors:,} tensors, {report.base_fingerprints:,} fingerprints of its base"
    return Outcome(figure, {"tensors": report.tensors, "base_fingerprints": report.base_fingerprints})


KIND = StepKind(
    inputs=(
        Input("adopt", required=True, with_card=True, takes_outputs=False, check=refuse_manifest),
        Input("base", takes="checkpoint"),
    ),
    options=AdoptOptions,
    run=_run,
    makes=lambda options: {"": None},
)
