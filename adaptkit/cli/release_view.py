"""Display of a recipe's run: progress lines, a result table, the tree of a dry run, and a Markdown page for CI."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from adaptkit.cli.output import aligned, branches, size

if TYPE_CHECKING:
    from adaptkit.pipeline.run import InputReport, RunReport, StepResult

_HEADINGS = ("step", "kind", "state", "seconds", "result")
_DRY_RUN = {"to do": "would run", "may follow": "would run if its inputs change"}


def source_text(source: "InputReport") -> str:
    """Describe a source in a few words."""
    commit = f", commit {source.commit[:12]}" if source.commit else ""
    return f"{source.what}{commit}, {size(source.bytes)}" + ("" if source.is_here else ", not downloaded yet")


def step_text(step: "StepResult") -> str:
    """Describe a step's result in one line."""
    took = f" in {step.seconds:.1f} s" if step.state == "done" else ""
    return f"{step.kind}: {_DRY_RUN.get(step.state, step.state)}{took}" + (f", {step.figure}" if step.figure else "")


def table(steps: Sequence["StepResult"]) -> Iterator[str]:
    """Yield a table with a line for each step."""
    return aligned([_HEADINGS, *map(_cells, steps)], right=(_HEADINGS.index("seconds"),))


def _cells(step: "StepResult") -> tuple[str, str, str, str, str]:
    return step.name, step.kind, step.state, f"{step.seconds:.1f}" if step.state == "done" else "", step.figure


def tree(report: "RunReport") -> Iterator[str]:
    """Yield the lines of a dry run's tree: the steps that no other step needs, with their inputs below them."""
    texts = {source.name: source_text(source) for source in report.sources}
    texts |= {step.name: step_text(step) for step in report.steps}
    makers = {name: step.name for step in report.steps for name in step.makes}
    below = {
        step.name: list(dict.fromkeys([*(makers.get(name, name) for name in step.inputs), *step.needs]))
        for step in report.steps
    }
    drawn: set[str] = set()

    def inputs(name: str) -> Sequence[str]:
        """Return what is drawn below a name: nothing if it was drawn before."""
        names = [] if name in drawn else below.get(name, [])
        drawn.add(name)
        return names

    needed = {name for names in below.values() for name in names}
    rows = []
    for top in (step.name for step in report.steps if step.name not in needed):
        rows.append((top, texts[top]))
        for stem, name in branches(inputs(top), inputs):
            rows.append((stem + name, "(above)" if name in drawn and below.get(name) else texts[name]))
    return aligned(rows)


def summary(name: str, sources: Sequence["InputReport"], steps: Sequence["StepResult"], ending: str) -> str:
    """Return a Markdown page on a run.

    Args:
        name: name of the release.
        sources: its sources.
        steps: the steps done or kept so far.
        ending: one sentence on how the run ended.
    """
    from adaptkit.cli.pages.page import render

    return render(
        "release.md",
        name=name,
        ending=ending,
        sources=sources,
        headings=_HEADINGS,
        steps=[_cells(step) for step in steps],
        published=[step.facts for step in steps if "repo_id" in step.facts],
        outputs=[output for step in steps for output in step.outputs],
    )
