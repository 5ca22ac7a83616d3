"""Several models on the same data and text: bases, examples in the prompt, adapters, fully trained checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adaptkit.arguments import AnyPath, optional, several
from adaptkit.checkpoint.adapter import Adapter
from adaptkit.errors import UsageError
from adaptkit.networks.alone import alone
from adaptkit.training.evaluation.evaluate import check_request, load, measure, read_own
from adaptkit.training.evaluation.material import Asked, read_material
from adaptkit.training.evaluation.report import Answer, EvaluateOptions, EvaluateReport
from adaptkit.training.network.lineage import Weights, base_of, check_whole, parent_among


@dataclass(frozen=True)
class Forgetting:
    """What training did to a model's general text.

    Attributes:
        model: label of the trained one.
        before: label of what it was made from.
        loss_before: mean cross-entropy of ``before`` on the text, in nats.
        loss_after: of the trained one.
        perplexity_before: the exponential; None where that is no number.
        perplexity_after: of the trained one.
    """

    model: str
    before: str
    loss_before: float
    loss_after: float
    perplexity_before: float | None
    perplexity_after: float | None


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        models: every base, then every base with examples, then every adapter on its base, each in the order given.
        forgetting: for each model but the first that was made from another of them; empty without text.
        same_text: whether the text is the same tokens for all; perplexities of others cannot be compared.
    """

    models: tuple[EvaluateReport, ...]
    forgetting: tuple[Forgetting, ...]
    same_text: bool = True


@dataclass(frozen=True)
class _Subject:
    """A model to measure, and the number of the one that it is compared with."""

    base: Path
    adapter: Adapter | None
    shots: bool
    before: int | None

    @property
    def asked(self) -> Asked:
        """How it is asked."""
        return Asked.of(self.base, self.adapter.root if self.adapter is not None else None)


@alone()
def compare(
    bases: AnyPath | Sequence[AnyPath],
    adapters: AnyPath | Sequence[AnyPath] = (),
    data: AnyPath | Sequence[AnyPath] = (),
    options: EvaluateOptions | None = None,
    *,
    text: AnyPath | Sequence[AnyPath] = (),
    reference: AnyPath | None = None,
    on_answer: Callable[[Answer], None] = lambda answer: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Measure models one after the other on the same data, text and questions.

    Every base is measured; with examples too, if the options have some; and with every adapter that belongs to it.
    A base that names another of them as what it was made from is compared with that one on the text, and with the
    first otherwise.

    Args:
        bases: folders of NF4 or plain checkpoints; fully trained ones among them.
        adapters: folders of LoRA adapters.
        data: rows with answers.
        options: how.
        text: files.
        reference: folder of a checkpoint that all models are compared with on the text.
        on_answer: told of every answer to the data's questions.
        progress: told how many models are measured, of how many.

    Raises:
        UsageError: nothing to measure, nothing says which of several bases an adapter belongs to, or too little memory.
        BaseMismatchError: an adapter belongs to none of the bases; or another vocabulary than the reference's.
        DataError: data or text cannot be used.
        IntegrityError: a base, an adapter or the reference is not what its manifest says.
    """
    bases = several(bases)
    adapters = several(adapters)
    data = several(data)
    text = several(text)
    reference = optional(reference)
    options = options or EvaluateOptions()
    check_request(data, text, options, reference)
    if not bases:
        raise UsageError("no model to evaluate", hint="give --base FOLDER")
    subjects = _subjects(bases, [read_own(adapter) for adapter in adapters], bool(options.shots))
    plain = replace(options, shots=0, shots_from=())
    asked = list(dict.fromkeys(subject.asked for subject in subjects))
    materials = dict(zip(asked, read_material(asked, data, text, plain, reference), strict=True))
    plainly = [Asked(base) for base in bases]
    examples = (
        dict(zip(plainly, read_material(plainly, data, (), options, others=asked), strict=True))
        if options.shots
        else {}
    )
    for folder in dict.fromkeys([*bases, *filter(None, [reference])]):
        check_whole(folder)
    other = load(reference, options) if reference is not None else None
    reports = []
    for done, subject in enumerate(subjects):
        progress(done, len(subjects))
        material = (examples if subject.shots else materials)[subject.asked]
        reports.append(measure(subject.base, subject.adapter, material, options, other, on_answer))
    progress(len(subjects), len(subjects))
    windows = [material.windows for material in materials.values() if material.windows is not None]
    same_text = all(torch.equal(windows[0], other) for other in windows)
    return Comparison(tuple(reports), _forgetting(subjects, reports), same_text)


def _subjects(bases: Sequence[Path], adapters: Sequence[Adapter], shots: bool) -> list[_Subject]:
    """The models in the order of the table."""
    for option, given in (("--base", bases), ("--adapter", [adapter.root for adapter in adapters])):
        for root in given:
            if given.count(root) > 1:
                raise UsageError(f"{root}: is given twice", hint=f"give each {option} once")
    subjects = []
    weights = [Weights(base) for base in bases]
    for number, base in enumerate(weights):
        parent = parent_among(base.manifest, [other for other in weights if other is not base])
        before = weights.index(parent) if parent is not None else 0
        subjects.append(_Subject(base.root, None, False, before if before != number else None))
    subjects += [_Subject(base, None, True, None) for base in bases if shots]
    for adapter in adapters:
        base = base_of(adapter, weights)
        subjects.append(_Subject(base.root, adapter, False, weights.index(base)))
    return subjects


def _forgetting(subjects: Sequence[_Subject], reports: Sequence[EvaluateReport]) -> tuple[Forgetting, ...]:
    found = []
    for subject, report in zip(subjects, reports, strict=True):
        before = None if subject.before is None else reports[subject.before]
        if before is not None and before.text is not None and report.text is not None:
            found.append(
                Forgetting(
                    report.label,
                    before.label,
                    before.text.loss,
                    report.text.loss,
                    before.text.perplexity,
                    report.text.perplexity,
                )
            )
    return tuple(found)
