"""A gate: check that each of the named programs could load an artifact."""

from dataclasses import dataclass
from typing import Any

from adaptkit.discovery import names
from adaptkit.operations import targets as registry
from adaptkit.operations.check import check
from adaptkit.pipeline.steps._kind import Facts, Input, Outcome, StepKind, Work
from adaptkit.settings import Settings, setting


@dataclass(frozen=True)
class CheckOptions(Settings):
    """For which programs to check."""

    target: tuple[str, ...] = setting("Program to check for. Default: all.", (), choices=tuple(names(registry)))


def _run(work: Work) -> Outcome:
    report = check(work.path("check"), work.options.target, work.optional("base"))
    taken = [verdict.target for verdict in report.verdicts if verdict.taken]
    refusals = {
        verdict.target: next(finding.found for finding in verdict.findings if finding.level == "error")
        for verdict in report.verdicts
        if not verdict.taken
    }
    return Outcome(f"loaded correctly by {', '.join(taken) or 'none'}", {"taken": taken, "refusals": refusals})


def _judge(options: Any, facts: Facts) -> str:
    return "; ".join(f"{target} does not load it correctly: {why}" for target, why in sorted(facts["refusals"].items()))


KIND = StepKind(
    inputs=(Input("check", required=True), Input("base", takes="checkpoint")),
    options=CheckOptions,
    run=_run,
    gates=lambda options: True,
    judge=_judge,
)
