"""``adaptkit stack``."""

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import chosen, output_options, settings_options
from adaptkit.cli.output import WORST, Row, counted, percent, show, span
from adaptkit.cli.paths import ArtifactPath
from adaptkit.cli.progress import count_progress
from adaptkit.discovery import names
from adaptkit.numerics import stacking
from adaptkit.operations.options import StackOptions

if TYPE_CHECKING:
    from adaptkit.operations.stack import StackReport


class _WithMethods(click.Command):
    """A command whose help lists each method with its module's first line, read without importing it (and torch)."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See ``click.Command``."""
        rows = []
        for name in names(stacking):
            source = Path(stacking.__path__[0], f"{name}.py").read_text(encoding="utf-8")
            rows.append((name, (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]))
        with formatter.section("Methods"):
            formatter.write_dl(rows)


@click.command(cls=_WithMethods)
@click.argument("adapters", nargs=-1, required=True, type=ArtifactPath())
@output_options
@settings_options(StackOptions)
@click.option("--density", type=float, metavar="SHARE", help="Share of elements to keep.")
@click.option(
    "--epsilon", type=float, help="della: keep probabilities are density ± epsilon, largest for the largest elements."
)
@click.option("--gamma", type=float, metavar="SHARE", help="breadcrumbs: share of elements to drop, the largest.")
@click.option("--lambda", "lambda_", type=float, metavar="FACTOR", help="Scale of the result. [default: 1]")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of methods that drop elements at random. [default: 0]")
@click.option("--dry-run", is_flag=True, help="Report what would be lost; write nothing.")
def command(
    adapters: tuple[Path, ...],
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    dry_run: bool,
    density: float | None,
    epsilon: float | None,
    gamma: float | None,
    lambda_: float | None,
    seed: int | None,
    **options: Any,
) -> None:
    """Combine ADAPTERS into one adapter.

    Each adapter's change is multiplied by its weight before the method is applied. Defaults of other options depend on
    the method; options that it does not use are rejected.
    """
    from adaptkit.operations.stack import stack

    of_method = {"density": density, "epsilon": epsilon, "gamma": gamma, "lambda": lambda_, "seed": seed}
    of_method = {name: value for name, value in of_method.items() if value is not None}
    wanted = chosen(StackOptions, options, settings=of_method)
    with count_progress("stack", as_json or quiet) as progress:
        report = stack(adapters, output, wanted, force=force, dry_run=dry_run, progress=progress)
    show(report, _rows(report, dry_run), as_json=as_json, quiet=quiet)


def _rows(report: "StackReport", dry_run: bool) -> list[Row]:
    settings = ", ".join(f"{name} {value:g}" for name, value in report.settings.items())
    partial = f"; {report.partial} not in every adapter" if report.partial else ""
    losing = sorted((m for m in report.per_module if m.energy_kept < 1), key=lambda m: (m.energy_kept, m.module))
    names = f"names differ: {' and '.join(map(repr, report.base_names))}; the result names none"
    return [
        ("would write" if dry_run else "wrote", report.output),
        (
            "stacked",
            f"{counted(report.adapters, 'adapter')} by {report.method}" + (f" ({settings})" if settings else ""),
        ),
        ("modules", f"{report.modules}, rank {span(report.ranks)}{partial}"),
        ("energy kept", f"{percent(report.energy_kept)} of the squared norm"),
        ("kept least", "\n".join(f"{percent(m.energy_kept)} {m.module}" for m in losing[:WORST])),
        ("zero", f"{counted(report.zero, 'module')} with no change left" if report.zero else None),
        ("base", names if len(report.base_names) > 1 else None),
        ("also copied", f"their copies of {', '.join(report.base_copies)}" if report.base_copies else None),
        ("also copied", ", ".join(report.tokenizer)),
        *(("note", text) for text in report.notes),
        ("manifest sha256", report.manifest_sha256),
    ]
