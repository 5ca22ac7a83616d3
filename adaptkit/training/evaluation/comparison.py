"""Comparison of models on the same data and text: bases, few-shot prompts, adapters, fully trained checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adaptkit.arguments import AnyPath, as_path_or_none, as_paths, checked_options
from adaptkit.checkpoint.adapter import Adapter
from adaptkit.errors import UsageError
from adaptkit.models.base_weights import Weights
from adaptkit.models.model_lock import model_lock
from adaptkit.training.evaluation.evaluate import check_files, check_request, load, measure, read_own
from adaptkit.training.evaluation.material import Asked, read_material
from adaptkit.training.evaluation.options import EvaluateOptions
from adaptkit.training.evaluation.report import EvaluateReport, GeneratedAnswer
from adaptkit.training.network.lineage import base_of, parent_among


@dataclass(frozen=True)
class Forgetting:
    """How training changed a model's loss on general text.

    Attributes:
        model: label of the trained model.
        before: label of the model that it is compared with.
        loss_before: mean cross-entropy of ``before`` on the text, in nats.
        loss_after: the same for the trained model.
        perplexity_before: exponential of ``loss_before``; None if it is too large.
        perplexity_after: the same for the trained model.
    """

    model: str
    before: str
    loss_before: float
    loss_after: float
    perplexity_before: float | None
    perplexity_after: float | None


@dataclass(frozen=True)
class Comparison:
    """Measurements of several models.

    Attributes:
        models: every base, then every base with examples, then every adapter on its base, each in the order given.
        forgetting: one entry for each model that is compared with another of them; empty without text.
        same_text: whether the text has the same tokens for all models; perplexities are not comparable otherwise.
    """

    models: tuple[EvaluateReport, ...]
    forgetting: tuple[Forgetting, ...]
    same_text: bool = True


@dataclass(frozen=True)
class _Subject:
    """A model to measure, and the index of the model that it is compared with."""

    base: Path
    adapter: Adapter | None
    shots: bool
    before: int | None

    @property
    def asked(self) -> Asked:
        """Where its tokenizer and chat template come from."""
        return Asked.of(self.base, self.adapter.root if self.adapter is not None else None)


@model_lock()
def compare(
    bases: AnyPath | Sequence[AnyPath],
    adapters: AnyPath | Sequence[AnyPath] = (),
    data: AnyPath | Sequence[AnyPath] = (),
    options: EvaluateOptions | None = None,
    *,
    text: AnyPath | Sequence[AnyPath] = (),
    reference: AnyPath | None = None,
    on_answer: Callable[[GeneratedAnswer], None] = lambda answer: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Measure models one after the other on the same data, text and questions.

    Every base is measured by itself; also with examples, if the options have some; and with every adapter that belongs
    to it. On the text, an adapter is compared with its base, and a base with the one that its manifest names as parent,
    or else with the first.

    Args:
        bases: folders of NF4 or plain checkpoints, including fully trained ones.
        adapters: folders of LoRA adapters.
        data: files of rows with answers.
        options: how to evaluate.
        text: text files.
        reference: folder of a checkpoint that all models are compared with on the text.
        on_answer: called with every answer to the data's questions.
        progress: called with the number of models measured so far and in total.

    Raises:
        UsageError: nothing to measure, it is unknown which of several bases an adapter belongs to, or memory runs out.
        BaseMismatchError: an adapter belongs to none of the bases, or a vocabulary differs from the reference's.
        DataError: data or text cannot be used.
        IntegrityError: a base, an adapter or the reference does not match its manifest.
    """
    bases = as_paths(bases, "bases")
    adapters = as_paths(adapters, "adapters")
    data = as_paths(data, "data")
    text = as_paths(text, "text")
    reference = as_path_or_none(reference, "reference")
    options = checked_options(options, EvaluateOptions)
    check_request(data, text, options, reference)
    if not bases:
        raise UsageError("no model to evaluate", hint="give --base FOLDER")
    subjects = _subjects(bases, [read_own(adapter) for adapter in adapters], bool(options.shots))
    asked = list(dict.fromkeys(subject.asked for subject in subjects))
    plain, plainly = replace(options, shots=0, shots_from=()), [Asked(base) for base in bases]
    materials = dict(zip(asked, read_material(asked, data, text, plain, reference), strict=True))
    shown = read_material(plainly, data, (), options, others=asked) if options.shots else ()
    examples = dict(zip(plainly, shown, strict=False))
    for folder in dict.fromkeys([*bases, *filter(None, [reference])]):
        check_files(folder)
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
    """Return the models in the order of ``Comparison.models``."""
    for option, given in (("--base", bases), ("--adapter", [adapter.root for adapter in adapters])):
        for root in given:
            if given.count(root) > 1:
                raise UsageError(f"{root}: is given twice", hint=f"give each {option} once")
    subjects = []
    weights = [Weights(base) for base in bases]
    parents = [parent_among(base.manifest, [other for other in weights if other is not base]) for base in weights]
    first = parents.index(None) if None in parents else None  # the first base itself may be made from a later one
    for number, parent in enumerate(parents):
        before = weights.index(parent) if parent is not None else first
        subjects.append(_Subject(bases[number], None, False, before if before != number else None))
    subjects += [_Subject(base, None, True, None) for base in bases if shots]
    for adapter in adapters:
        base = base_of(adapter, weights)
        base.check_vocabulary(adapter)
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
