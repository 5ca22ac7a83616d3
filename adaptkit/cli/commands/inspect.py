"""``adaptkit inspect``."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from adaptkit.cli.lineage import mermaid, tree
from adaptkit.cli.options import report_options
from adaptkit.cli.output import Row, say, show, size
from adaptkit.cli.paths import ArtifactPath, LocalPath
from adaptkit.cli.progress import byte_progress


@click.command()
@click.argument("path", type=ArtifactPath())
@click.option("--lineage", is_flag=True, help="Draw the tree of its parents, their parents, and so on.")
@click.option(
    "--parents",
    type=LocalPath(),
    multiple=True,
    metavar="DIR",
    help="Where to look for parents: an artifact, or a folder of artifacts. Repeatable.",
)
@click.option("--mermaid", "as_mermaid", is_flag=True, help="Print only the lineage, as a Mermaid flow chart.")
@report_options
def command(path: Path, lineage: bool, parents: tuple[Path, ...], as_mermaid: bool, as_json: bool, quiet: bool) -> None:
    """Show what the folder PATH contains and what it was made from."""
    from adaptkit.operations.inspect import inspect, trace

    if as_mermaid and as_json:
        raise click.UsageError("--mermaid and --json: only one can be given")
    report = inspect(path)
    if lineage or as_mermaid or parents:
        with byte_progress("inspect", as_json or quiet) as progress:
            report = replace(report, lineage=trace(path, parents, progress))
    if as_mermaid and quiet:
        return
    if as_mermaid:
        say(mermaid(f"{report.kind}\nmanifest {str(report.manifest_sha256)[:16]}…\n{report.path}", report.lineage))
        return
    rows = [
        ("kind", report.kind),
        ("parameters", "not recorded in this format" if report.parameters is None else f"{report.parameters:,}"),
        ("tensors", f"{report.tensors} ({', '.join(f'{n} {t}' for t, n in report.dtypes.items())})"),
        ("size", size(report.bytes)),
        *(_row(key, value) for key, value in report.details.items() if value is not None),
        ("made from", "\n".join(tree(report.lineage))),
    ]
    for parent in report.parents if not report.lineage else ():
        weight = f", weight {parent['weight']}" if "weight" in parent else ""
        rows.append(("made from", f"{parent['role']} ({parent['kind']}{weight}) {parent['tensors_root']}"))
    rows.append(("tensors root", report.tensors_root))
    rows.append(("manifest sha256", report.manifest_sha256 or "none; made by another tool"))
    show(report, rows, as_json=as_json, quiet=quiet)


def _row(key: str, value: Any) -> Row:
    if key.endswith("_bytes"):
        return key.removesuffix("_bytes").replace("_", " "), size(value)
    if key == "replaced_rows":
        return "replaced rows", ", ".join(f"{count} of {module}" for module, count in value.items())
    if key == "expert_stacks":
        return "expert stacks", ", ".join(f"{count} of {experts}" for experts, count in value.items())
    return key.replace("_", " "), _words(value)


def _words(value: Any) -> str:
    if isinstance(value, dict):  # value -> count
        return ", ".join(f"{item} ({count})" if len(value) > 1 else str(item) for item, count in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
