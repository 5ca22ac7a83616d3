"""Stack several adapters into one."""

from adaptkit.errors import UsageError
from adaptkit.operations._terms import weights_of
from adaptkit.operations.options import StackOptions
from adaptkit.operations.stack import stack
from adaptkit.pipeline.steps._kind import Input, Inputs, Outcome, StepKind, Work
from adaptkit.wording import counted


def _run(work: Work) -> Outcome:
    report = stack(work.paths["stack"], work.output, work.options, progress=work.progress)
    for text in report.notes:
        work.note(text)
    stacked = f"{counted(report.adapters, 'adapter')} by {report.method}"
    figure = f"{stacked}, {100 * report.energy_kept:.3g} % of the squared norm kept"
    return Outcome(figure, {"modules": report.modules, "ranks": list(report.ranks), "energy_kept": report.energy_kept})


def _validate(options: StackOptions, inputs: Inputs) -> None:
    if len(inputs["stack"]) < 2:
        raise UsageError("stack needs at least two adapters", hint="to change the rank of one, use resize")
    weights_of(inputs["stack"], options.weights)


KIND = StepKind(
    inputs=(Input("stack", many=True, required=True, takes="adapter"),),
    options=StackOptions,
    run=_run,
    validate=_validate,
    makes=lambda options: {"": "adapter"},
)
