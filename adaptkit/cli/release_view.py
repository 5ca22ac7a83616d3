"""Display of a recipe's run: progress lines, a result table, the tree of a dry run, and a Markdown page for CI."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from adaptkit.cli.output import size

if TYPE_CHECKING:
    from adaptkit.pipeline.run import RunReport, SourceReport, StepReport

_HEADINGS = ("step", "kind", "state", "seconds", "result")


def source_text(source: "SourceReport") -> str:
    """Describe a source in a few words."""
    commit = f", commit {source.commit[:12]}" if source.commit else ""
    return f"{source.what}{commit}, {size(source.bytes)}" + ("" if source.is_here else ", not downloaded yet")


def step_text(step: "StepReport") -> str:
    """Describe a step's result in one line."""
    took = f" in {step.seconds:.1f} s" if step.state == "done" else ""
    return f"{step.kind}: {step.state}{took}" + (f", {step.figure}" if step.figure else "")


def table(steps: Sequence["StepReport"]) -> Iterator[str]:
    """Yield a table with a line for each step."""
    rows = [_HEADINGS, *(_cells(step) for step in steps)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        aligned = [f"{cell:>{width}}" if heading == "seconds" else f"{cell:<{width}}"
                   for heading, cell, width in zip(_HEADINGS, row, widths, strict=True)]  # fmt: skip
        yield "  ".join(aligned).rstrip()


def _cells(step: "StepReport") -> tuple[str, str, str, str, str]:
    return (step.name, step.kind, step.state, f"{step.seconds:.1f}" if step.state == "done" else "", step.figure)


def tree(report: "RunReport") -> Iterator[str]:
    """Yield the lines of a dry run's tree: the steps that no other step needs, with their inputs below them."""
    lines = dict(_descriptions(report))
    makers = {name: step.name for step in report.steps for name in step.makes}
    below = {
        step.name: list(dict.fromkeys([*(makers.get(name, name) for name in step.inputs), *step.needs]))
        for step in report.steps
    }
    waited_for = {name for names in below.values() for name in names}
    seen: set[str] = set()
    drawn = [row for step in report.steps if step.name not in waited_for for row in _branch(step.name, below, seen)]
    width = max(len(stem) + len(name) for stem, name, _ in drawn)
    for stem, name, again in drawn:
        yield f"{stem + name:<{width}}  {'(above)' if again else lines[name]}".rstrip()


def _branch(name: str, below: dict[str, list[str]], seen: set[str], stem: str = "", inside: str = "") \
        -> Iterator[tuple[str, str, bool]]:  # fmt: skip
    again = name in seen and bool(below.get(name))
    yield stem, name, again
    seen.add(name)
    names = [] if again else below.get(name, [])
    for number, child in enumerate(names, 1):
        last = number == len(names)
        yield from _branch(
            child, below, seen, inside + ("└── " if last else "├── "), inside + ("    " if last else "│   ")
        )


def _descriptions(report: "RunReport") -> Iterator[tuple[str, str]]:
    for source in report.sources:
        yield source.name, source_text(source)
    words = {"to do": "would run", "may follow": "would run if its inputs change"}
    for step in report.steps:
        yield (
            step.name,
            f"{step.kind}: {words.get(step.state, step.state)}" + (f", {step.figure}" if step.figure else ""),
        )


def summary(name: str, sources: Sequence["SourceReport"], steps: Sequence["StepReport"], ending: str) -> str:
    """Return a Markdown page on a run.

    Args:
        name: name of the release.
        sources: its sources.
        steps: the steps done or kept so far.
        ending: one sentence on how the run ended.
    """
    rows = [_HEADINGS, ("---", "---", "---", "---:", "---"), *(_cells(step) for step in steps)]
    lines = [f"## {_cell(name)}", "", _cell(ending), "", *(_row(row) for row in rows)]
    lines += ["", _row(("made from", "", "commit", "sha256")), _row(("---", "---", "---", "---"))]
    lines += [_row((s.name, s.what, (s.commit or "")[:12], f"`{s.digest}`" if s.digest else "")) for s in sources]
    lines += _published(steps)
    made = [output for step in steps for output in step.outputs]
    if made:
        lines += ["", _row(("artifact", "size", "manifest sha256")), _row(("---", "---:", "---"))]
        lines += [_row((output.name, size(output.bytes), f"`{output.manifest_sha256}`")) for output in made]
    return "\n".join(lines) + "\n\n"


def _published(steps: Sequence["StepReport"]) -> Iterator[str]:
    sent = [step.facts for step in steps if "repo_id" in step.facts]
    if sent:
        yield from ("", _row(("published", "commit", "manifest sha256")), _row(("---", "---", "---")))
        for facts in sent:
            yield _row((facts["repo_id"], f"`{facts['commit']}`", f"`{facts['manifest_sha256']}`"))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Escape text so that it stays in its table cell and is not interpreted as markup."""
    plain = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return plain.replace("<", "&lt;").replace("[", "\\[").replace("@", "&#64;")
