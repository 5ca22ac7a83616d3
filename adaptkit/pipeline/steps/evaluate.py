"""Evaluate a model; with ``require``, this is a gate."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from adaptkit.documents import nearest
from adaptkit.errors import UsageError
from adaptkit.pipeline.artifact import refuse_undecoded
from adaptkit.pipeline.steps._kind import Facts, Input, Inputs, Outcome, StepKind, Work
from adaptkit.settings import Settings
from adaptkit.training.evaluation.evaluate import check_request, evaluate
from adaptkit.training.evaluation.options import EvaluateOptions
from adaptkit.training.evaluation.report import EvaluateReport
from adaptkit.wording import counted


@dataclass(frozen=True)
class Limits(Settings):
    """The range that a figure must be in, inclusive.

    Attributes:
        min: lower limit; None for none.
        max: upper limit; None for none.
    """

    min: float | None = None
    max: float | None = None

    def validate(self) -> None:
        """See ``Settings``."""
        if self.min is None and self.max is None:
            raise UsageError("has no limit", hint="set min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise UsageError(f"min {self.min:g} is larger than max {self.max:g}", hint="set min to at most max")

    def __str__(self) -> str:
        ends = (("at least", self.min), ("at most", self.max))
        return ", ".join(f"{word} {end:.15g}" for word, end in ends if end is not None)

    def allow(self, value: float) -> bool:
        """Return whether a figure is within the limits; False for NaN."""
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)


@dataclass(frozen=True)
class EvaluateStep(EvaluateOptions):
    """Options of the evaluation, and limits for its figures.

    Attributes:
        require: maps figures of the report, such as ``loss``, ``text.perplexity`` or ``generated.scores.bleu``, to
            their limits.
    """

    require: Mapping[str, Limits] = field(default_factory=dict)

    def validate(self) -> None:
        """See ``Settings``."""
        super().validate()
        known = set(_figures(EvaluateReport))
        for name in self.require:
            if name not in known:
                raise UsageError(f"require: unknown figure {name!r}", hint=nearest(name, known))


def _figures(kind: type[Any], prefix: str = "") -> Iterator[str]:
    """Iterate over the dotted names of all numbers in a report."""
    hints = get_type_hints(kind)
    for part in fields(kind):
        choices = get_args(hints[part.name]) or (hints[part.name],)
        inner = next((choice for choice in choices if is_dataclass(choice)), None)
        if isinstance(inner, type):
            yield from _figures(inner, f"{prefix}{part.name}.")
        elif float in choices or int in choices:
            yield prefix + part.name


def _validate(options: EvaluateStep, inputs: Inputs) -> None:
    """Reject, before anything runs, required figures that would not be measured.

    Raises:
        UsageError: names the missing keys.
    """
    data, text = ([Path(name) for name in inputs.get(key, ())] for key in ("data", "text"))
    reference = next(map(Path, inputs.get("reference", ())), None)
    check_request(data, text, replace(options, shots=0, shots_from=()), reference)
    given = {*inputs, *(("generate",) if options.generate else ())}
    for name in options.require:
        missing = [key for key in _measured_with(name) if key not in given]
        if missing:
            raise UsageError(
                f"require: {name} is measured only with {' and '.join(missing)}",
                hint=f"add {' and '.join(missing)} to the step, or remove {name}",
            )


def _measured_with(figure: str) -> tuple[str, ...]:
    """Return the keys that a step must have for this figure to be measured."""
    if figure.startswith("generated."):
        return ("data", "generate")
    if figure.startswith(("text.reference", "text.kl", "text.same")):
        return ("text", "reference")
    return {"text": ("text",), "loss": ("data",), "perplexity": ("data",)}.get(figure.partition(".")[0], ())


def _run(work: Work) -> Outcome:
    report = evaluate(
        work.path("evaluate"),
        work.optional("adapter"),
        work.paths.get("data", ()),
        work.options,
        text=work.paths.get("text", ()),
        reference=work.optional("reference"),
    )
    for text in filter(None, (report.template_remark, *report.unused_remarks)):
        work.note(text)
    facts = dict(_flat(asdict(report)))
    for name in ("loss", "text.loss", "generated.scores.rouge_l"):
        if facts.get(name) is not None:
            return Outcome(f"{name} {facts[name]:.4f}", facts)
    return Outcome(counted(len(report.answers), "answer"), facts)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value


def _judge(options: EvaluateStep, facts: Facts) -> str:
    missed = []
    for name, limits in sorted(options.require.items()):
        value = facts.get(name)
        if value is None:
            missed.append(f"{name} was not measured")
        elif not limits.allow(value):
            rounded = f"{value:.4f}"  # if that is within the limits, all digits
            missed.append(f"{name} is {value if limits.allow(float(rounded)) else rounded}; required: {limits}")
    return "; ".join(missed)


KIND = StepKind(
    inputs=(
        Input("evaluate", required=True, takes="checkpoint", check=refuse_undecoded),
        Input("adapter", takes="adapter"),
        Input("data", many=True, takes="file"),
        Input("text", many=True, takes="file"),
        Input("reference", takes="checkpoint", check=refuse_undecoded),
        Input("shots_from", field="shots_from", many=True, takes="file"),
    ),
    options=EvaluateStep,
    run=_run,
    validate=_validate,
    gates=lambda options: bool(options.require),
    judge=_judge,
    not_in_key=frozenset({"require"}),
)
