"""Drawing an artifact's lineage, as a text tree or a Mermaid flow chart."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from adaptkit.cli.output import branches, counted

if TYPE_CHECKING:
    from adaptkit.operations._lineage.tree import Ancestor

_SHOWN = 16
"""Number of hash digits shown."""


def tree(parents: Sequence["Ancestor"]) -> Iterator[str]:
    """Yield a line for each ancestor, below the artifact that was made from it."""
    return (stem + _line(parent) for stem, parent in branches(parents, lambda parent: parent.parents))


def mermaid(root: str, parents: Sequence["Ancestor"]) -> str:
    """Return a Mermaid flow chart from the oldest ancestors to the artifact, in which each artifact appears once.

    Args:
        root: lines that describe the artifact.
        parents: parents of the artifact.
    """
    lines = ["flowchart TD", f'    a0["{_escaped(root)}"]']
    _draw("a0", parents, lines, {})
    return "\n".join(lines)


def _draw(child: str, parents: Sequence["Ancestor"], lines: list[str], names: dict[str, str]) -> None:
    for parent in parents:
        name = names.get(_hash(parent))
        known = name is not None
        if name is None:
            name = names[_hash(parent)] = f"a{len(names) + 1}"
            lines.append(f'    {name}["{_escaped(_label(parent))}"]')
        weight = f" × {parent.weight:g}" if parent.weight is not None else ""
        lines.append(f'    {name} -- "{_escaped(parent.role + weight)}" --> {child}')
        if not known:
            _draw(name, parent.parents, lines, names)


def _line(parent: "Ancestor") -> str:
    weight = f" × {parent.weight:g}" if parent.weight is not None else ""
    made = f", made by {parent.operation}" if parent.operation else ""
    where = f"{parent.path}, {parent.state}" if parent.path else parent.state
    targets = f", {counted(parent.targets, 'fingerprint', 'agree')}" if parent.targets else ""
    return f"{parent.role}{weight}: {parent.kind} {_hash(parent)}{made}: {where}{targets}"


def _label(parent: "Ancestor") -> str:
    made = f" by {parent.operation}" if parent.operation else ""
    return f"{parent.kind}{made}\n{_hash(parent)}\n{parent.path or parent.state}"


def _hash(parent: "Ancestor") -> str:
    if parent.manifest_sha256 is not None:
        return f"manifest {parent.manifest_sha256[:_SHOWN]}…"
    return f"tensors {parent.tensors_root[:_SHOWN]}…"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace("\n", "<br>")
