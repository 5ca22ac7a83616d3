"""Train an adapter, or with ``method: full`` all weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adaptkit.pipeline.artifact import Takes, refuse_undecoded
from adaptkit.pipeline.steps._kind import Input, Inputs, Outcome, StepKind, Work
from adaptkit.training.config import INITS, TrainConfig
from adaptkit.training.loop import train
from adaptkit.wording import counted

_BASES: Mapping[str, Takes] = {"full": "unquantized checkpoint", "qlora": "quantized checkpoint"}
"""Methods that take only such a base."""
_INPUTS = (
    Input(
        "train",
        required=True,
        takes="checkpoint",
        takes_with=lambda options: _BASES.get(options.method),
        check=refuse_undecoded,
    ),
    Input("data", many=True, required=True, takes="file"),
    Input("held_out_data", many=True, takes="file"),
    Input("chat_template", takes="file"),
    Input("init", words=INITS, takes="adapter"),
)


def _run(work: Work) -> Outcome:
    options: TrainConfig = work.options
    paths = {key: tuple(map(str, found)) for key, found in work.paths.items()}
    files = dict(zip(work.names["data"], paths["data"], strict=True))
    config = replace(
        options,
        base=paths["train"][0],
        data=paths["data"],
        held_out_data=paths.get("held_out_data", ()),
        chat_template=paths["chat_template"][0] if "chat_template" in paths else None,
        init=paths["init"][0] if "init" in paths else options.init,
        mixture=options.mixture and {files[name]: weight for name, weight in options.mixture.items()},
    )
    report = train(config, work.output, on_step=lambda step: work.progress(step.step, step.steps), note=work.note)
    before, after = report.held_out_before, report.held_out_after
    figure = counted(report.steps, "step") if after is None else f"held-out loss {before:.4f} -> {after:.4f}"
    facts = {"steps": report.steps, "held_out_before": before, "held_out_after": after, "samples": report.samples}
    return Outcome(figure, facts)


def _complete(values: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """Add placeholders for fields that inputs will fill; ``.`` for any folder, since the key covers its content."""
    placeholders: dict[str, Any] = {"base": ".", "data": list(inputs["data"])}
    if "held_out_data" in inputs:
        placeholders["held_out_data"] = list(inputs["held_out_data"])
    if "init" in inputs:
        placeholders["init"] = "."
    return values | placeholders


KIND = StepKind(
    inputs=_INPUTS,
    options=TrainConfig,
    run=_run,
    refused={
        "base": "remove it: the value of train is the base",
        "tensorboard": "remove it: a step writes only to the work folder",
        "wandb": "remove it: a step does not use this network service",
    },
    complete=_complete,
    makes=lambda options: {"": "unquantized checkpoint" if options.method == "full" else "adapter"},
    needs_transformers=lambda options: True,
)
