"""Train an adapter, or with ``method: full`` all weights."""

from collections.abc import Mapping

from adaptkit.pipeline.artifact import Takes, refuse_undecoded
from adaptkit.pipeline.steps._kind import Input, Outcome, StepKind, Work
from adaptkit.training.config import INITS, TrainConfig
from adaptkit.training.loop import train
from adaptkit.wording import counted

_BASES: Mapping[str, Takes] = {"full": "unquantized checkpoint", "qlora": "quantized checkpoint"}
"""Methods that take only such a base."""
_INPUTS = (
    Input(
        "train",
        field="base",
        required=True,
        takes="checkpoint",
        takes_with=lambda options: _BASES.get(options.method),
        check=refuse_undecoded,
    ),
    Input("data", field="data", keyed_option="mixture", many=True, required=True, takes="file"),
    Input("held_out_data", field="held_out_data", many=True, takes="file"),
    Input("chat_template", field="chat_template", takes="file"),
    Input("init", field="init", words=INITS, takes="adapter"),
)


def _run(work: Work) -> Outcome:
    report = train(work.options, work.output, on_step=lambda step: work.progress(step.step, step.steps), note=work.note)
    before, after = report.held_out_before, report.held_out_after
    figure = counted(report.steps, "step") if after is None else f"held-out loss {before:.4f} -> {after:.4f}"
    facts = {"steps": report.steps, "held_out_before": before, "held_out_after": after, "samples": report.samples}
    return Outcome(figure, facts)


KIND = StepKind(
    inputs=_INPUTS,
    options=TrainConfig,
    run=_run,
    refused={
        "base": "remove it: the value of train is the base",
        "tensorboard": "remove it: a step writes only to the work folder",
        "wandb": "remove it: a step does not use this network service",
    },
    makes=lambda options: {"": "unquantized checkpoint" if options.method == "full" else "adapter"},
)
