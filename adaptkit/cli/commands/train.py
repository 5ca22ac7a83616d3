"""``adaptkit train``."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import InSections, given, output_options, settings_options
from adaptkit.cli.output import Row, counted, say, show, size, torchrun_rank
from adaptkit.cli.paths import ArtifactPath, LocalPath, fetched
from adaptkit.cli.progress import training_progress
from adaptkit.cli.training_view import batch_lines, cut_rows, data_rows, has_colour
from adaptkit.documents import Place, read_document
from adaptkit.errors import UsageError
from adaptkit.settings import read_settings
from adaptkit.training.config import TrainConfig
from adaptkit.training.product_cache import limit_product_cache

if TYPE_CHECKING:
    from adaptkit.training.preview import Preview
    from adaptkit.training.report import RunPlan, TrainReport


@click.command(cls=InSections)
@output_options
@click.option("--config", "config_file", type=LocalPath(), help="YAML or JSON file with these options.")
@click.option("--resume", is_flag=True, help="Resume; fail if there is no checkpoint.")
@click.option("--dry-run", is_flag=True, help="Check everything and show what would be done; write nothing.")
@click.option("--show-batch", is_flag=True, help="Print the first batch, with the learned tokens marked, and exit.")
@settings_options(
    TrainConfig,
    **dict.fromkeys(("base", "init"), ArtifactPath()),
    **dict.fromkeys(("data", "held_out_data", "chat_template", "tensorboard"), click.Path(readable=False)),
)
def command(
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    config_file: Path | None,
    resume: bool,
    dry_run: bool,
    show_batch: bool,
    **options: Any,
) -> None:
    """Train an adapter on a quantized or 16-bit checkpoint.

    QLoRA on a quantized one, LoRA on a 16-bit one; --method full trains every weight of a 16-bit one.

    Every option is also a key of the --config file (dashes as underscores), except --output, --force, --config,
    --resume, --dry-run, --show-batch, --json and --quiet; the command line wins. The same command resumes an
    interrupted run.
    """
    if show_batch and dry_run:
        raise click.UsageError("--show-batch and --dry-run cannot be combined; choose one")
    document = read_document(config_file) if config_file else None
    values, chosen = document.values if document else {}, given(TrainConfig, options)
    for name in ("base", "data"):
        if document is None and name not in chosen:
            raise UsageError(f"--{name} is missing", hint=f"give --{name}, or a --config FILE with {name}")
    if {"steps", "epochs"} & set(chosen):  # either replaces both of the file's
        values = {name: value for name, value in values.items() if name not in ("steps", "epochs")}
    config = read_settings(TrainConfig, values, Place(document), chosen)
    for name in {"base", "init"} & (set(values) - set(chosen)):  # click fetches those of the command line
        place: Any = str(fetched(getattr(config, name), as_json or quiet))
        config = replace(config, **{name: place})
    is_first = torchrun_rank() == "0"
    if not is_first:
        as_json, quiet = False, True
    limit_product_cache()
    if show_batch:
        from adaptkit.training.preview import preview

        shown = preview(config)
        if is_first:
            _show_batch(shown, as_json, quiet)
        return
    from adaptkit.training.loop import train

    if dry_run:
        plan = train(config, output, force=force, resume=resume, dry_run=True)
        show(plan, _plan_rows(plan), as_json=as_json, quiet=quiet)
        return
    with training_progress(as_json or quiet, quiet) as (on_step, note):
        report = train(config, output, force=force, resume=resume, on_step=on_step, note=note)
    show(report, _rows(report), as_json=as_json, quiet=quiet)


def _show_batch(batch: "Preview", as_json: bool, quiet: bool) -> None:
    if as_json:
        show(batch, (), as_json=True, quiet=False)
    elif not quiet:
        say(*batch_lines(batch, has_colour()), styled=True)


def _plan_rows(plan: "RunPlan") -> list[Row]:
    memory = None
    if plan.predicted_bytes is not None:
        free = "" if plan.free_bytes is None else f", {size(plan.free_bytes)} free"
        memory = f"{size(plan.predicted_bytes)} predicted{free}"
    return [
        ("would write", plan.output),
        ("resumes from", f"step {plan.resumed_from}" if plan.resumed_from else None),
        ("steps", f"{plan.steps}, {plan.warmup_steps} of them warm-up"),
        ("samples", f"{plan.samples} to train on, {plan.held_out} held out"),
        ("training tokens", f"{plan.tokens:,}, {plan.answer_tokens:,} of them in answers"),
        ("trainable", f"{plan.trainable_parameters:,} parameters"),
        ("left out", plan.left_out),
        ("merge", plan.cannot_be_merged),
        ("peft", plan.peft_drops),
        ("activations", f"{plan.compute_dtype}; {plan.checkpointing}"),
        ("base", f"stays packed; {plan.decoded_by} decodes it" if plan.decoded_by else None),
        ("memory", memory),
        ("checkpoints", f"{size(plan.checkpoint_bytes)} each, {size(plan.disk_bytes)} at most"),
        *data_rows(plan.data),
        *cut_rows(plan.data, plan.truncated, plan.dropped),
    ]


def _rows(report: "TrainReport") -> list[Row]:
    measured, predicted, paging = report.memory["measured"], report.memory["predicted"] or 0, report.paging
    moved = f"{counted(paging['faults'], 'fault')}, {counted(paging['write_backs'], 'write-back')}"
    kept = f"the adapter after step {report.kept_step}; the last one is in last/"
    skipped = f"{counted(report.skipped, 'step')} with a NaN or infinite loss or gradient"
    held_out = None
    if report.held_out_before is not None and report.held_out_after is not None:
        held_out = f"{report.held_out_before:.4f} -> {report.held_out_after:.4f}"
    steps = f"{counted(report.steps, 'step')}, {counted(report.samples, 'sample')}"
    return [
        ("wrote", report.output),
        ("resumed from", f"step {report.resumed_from}" if report.resumed_from else None),
        ("held-out loss", held_out),
        ("trained", f"{report.trainable_parameters:,} parameters, {steps}"),
        ("kept", kept if report.kept_step != report.steps else None),
        ("skipped", skipped if report.skipped else None),
        # 0 if all steps were done before this run resumed
        ("speed", f"{report.tokens_per_second:.0f} tokens/s" if report.tokens_per_second else None),
        ("activations", f"{report.compute_dtype}; {report.checkpointing}"),
        ("base", f"stays packed; {report.decoded_by} decodes it" if report.decoded_by else None),
        (
            "memory",
            f"{size(predicted)} predicted, " + ("not measured" if measured is None else f"{size(measured)} measured"),
        ),
        ("optimizer state", f"{paging['slots']} of {counted(paging['pages'], 'page')} resident, {moved}"),
        *data_rows(report.data),
        *cut_rows(report.data, report.truncated, report.dropped),
        ("manifest sha256", report.manifest_sha256),
    ]
