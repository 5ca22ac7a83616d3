"""Merge adapters into a 16-bit checkpoint."""

from adaptkit.checkpoint.foreign import quantization_found
from adaptkit.checkpoint.progress import counted
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.pipeline.steps._kind import Input, Outcome, StepKind, Work


def _run(work: Work) -> Outcome:
    """Merge, but reject a quantized base: the operation would use a 16-bit base beside it, which is not an input."""
    base = work.path("merge")
    if quantization_found(Checkpoint(base)) is not None:
        name = work.names["merge"][0]
        raise CheckpointError(
            f"{name} is quantized", hint="use the 16-bit checkpoint that it was made from as a source"
        )
    report = merge(base, work.paths["adapters"], work.output, work.options, progress=work.progress)
    facts = {"base_verified": report.base_verified, "relative_delta": report.relative_delta, "effect": report.effect}
    return Outcome(f"{report.merged} of {counted(report.tensors, 'tensor')} changed", facts)


KIND = StepKind(
    inputs=(Input("merge", required=True), Input("adapters", many=True, required=True)), options=MergeOptions, run=_run
)
