"""Evaluation of one model: loss on held-out answers and on text, generated answers and their scores."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptkit.arguments import AnyPath, as_path, as_path_or_none, as_paths, checked_options
from adaptkit.checkpoint.adapter import Adapter, read_adapter
from adaptkit.checkpoint.integrity import check_tensors, read_input_manifest
from adaptkit.checkpoint.manifest import parent_of
from adaptkit.data.limits import pad_id
from adaptkit.errors import NonFiniteError, UsageError
from adaptkit.models.architecture import empty_network
from adaptkit.models.base_weights import Weights, check_base
from adaptkit.models.model_lock import model_lock
from adaptkit.training.device import choose_device, choose_dtype, make_current, name_of, without_cudnn_attention
from adaptkit.training.dtype_errors import reports_unsupported_dtype
from adaptkit.training.evaluation.generation import Generated, generate
from adaptkit.training.evaluation.material import Asked, EvaluationData, read_material
from adaptkit.training.evaluation.options import EvaluateOptions
from adaptkit.training.evaluation.perplexity import mean_loss, measure_text, perplexity_of
from adaptkit.training.evaluation.report import EvaluateReport, GeneratedAnswer, GenerationReport
from adaptkit.training.evaluation.scores import require_metrics, score
from adaptkit.training.fast import accelerate
from adaptkit.training.network.lineage import template_kwargs, trained_parameters
from adaptkit.training.network.loading import load_adapter
from adaptkit.training.network.model import Model, load_model
from adaptkit.training.out_of_memory import reports_out_of_memory


@model_lock()
def evaluate(
    base: AnyPath,
    adapter: AnyPath | None = None,
    data: AnyPath | Sequence[AnyPath] = (),
    options: EvaluateOptions | None = None,
    *,
    text: AnyPath | Sequence[AnyPath] = (),
    reference: AnyPath | None = None,
    on_answer: Callable[[GeneratedAnswer], None] = lambda answer: None,
) -> EvaluateReport:
    """Measure a model, with or without an adapter.

    Args:
        base: folder of an NF4 or plain checkpoint.
        adapter: folder of a LoRA adapter.
        data: files of rows with answers; see ``data.dataset``.
        options: how to evaluate.
        text: text files; see ``data.windows``.
        reference: folder of the checkpoint that the model was made from, to compare it with on the text.
        on_answer: called with every answer to the data's questions.

    Raises:
        UsageError: neither data, nor text, nor prompts; a reference without text; a metric package is missing; or
            memory runs out.
        BaseMismatchError: the adapter does not belong to the base, or the reference has another vocabulary.
        DataError: data or text cannot be used.
        IntegrityError: base, adapter or reference does not match its manifest.
    """
    base = as_path(base, "base")
    adapter = as_path_or_none(adapter, "adapter")
    data = as_paths(data, "data")
    text = as_paths(text, "text")
    reference = as_path_or_none(reference, "reference")
    options = checked_options(options, EvaluateOptions)
    check_request(data, text, options, reference)
    read = None if adapter is None else read_own(adapter)
    if read is not None:
        check_base(read, Weights(base))
    asked = Asked.of(base, adapter if data or options.prompts else None)
    (material,) = read_material([asked], data, text, options, reference)
    for folder in dict.fromkeys(filter(None, (base, reference))):
        check_files(folder)
    other = load(reference, options) if reference is not None else None
    return measure(base, read, material, options, other, on_answer)


def read_own(adapter: Path) -> Adapter:
    """Read an adapter, and check its tensors against its manifest, if it has one.

    Raises:
        IntegrityError: the tensors do not match the manifest.
    """
    read = read_adapter(adapter)
    parent_of("adapter", read.manifest, read.records, root=read.root)
    return read


def check_files(base: Path) -> None:
    """Compare config.json and all tensors of a base with its manifest, if it has one.

    Raises:
        IntegrityError: one differs.
    """
    check_tensors(base, read_input_manifest(base))


def check_request(data: Sequence[Path], text: Sequence[Path], options: EvaluateOptions, reference: Path | None) -> None:
    """Refuse arguments that do not go together, before anything is read.

    Raises:
        UsageError: says what is missing.
    """
    if not data and not text and not options.prompts:
        raise UsageError("nothing to evaluate", hint="give --data FILE, --text FILE or --prompt TEXT")
    if reference is not None and not text:
        raise UsageError("reference: needs text", hint="give --text FILE")
    if options.max_tokens is not None and not text:
        raise UsageError("max_tokens: needs text", hint="give --text FILE")
    if options.generate and not data:
        raise UsageError("generate: needs data with questions and answers", hint="give --data FILE")
    if options.shots and not data and not options.prompts:
        raise UsageError("shots: needs questions or prompts", hint="give --data FILE or --prompt TEXT")
    if options.generate:
        require_metrics()


@reports_out_of_memory("while the model was loaded", hint="use a base that adaptkit quantize made, or --device cpu")
def load(base: Path, options: EvaluateOptions, adapter: Adapter | None = None) -> Model:
    """Load a checkpoint, and an adapter on it if one is given.

    Raises:
        UsageError: the device is not available, or has too little memory.
    """
    device = choose_device(options.device)
    make_current(device)
    model = load_model(base, choose_dtype(options.compute_dtype, device), device)
    if adapter is not None:
        load_adapter(model, adapter)
    accelerate(model.network, model.dtype, device, model.output_layer, trains=False)
    return model


@without_cudnn_attention()
@reports_out_of_memory(
    "while the model was evaluated", hint="use a smaller --batch-size, --max-length or --window, or --device cpu"
)
def measure(
    base: Path,
    adapter: Adapter | None,
    material: EvaluationData,
    options: EvaluateOptions,
    reference: Model | None,
    on_answer: Callable[[GeneratedAnswer], None],
) -> EvaluateReport:
    """Measure one model on its material; see ``evaluate``."""
    model = load(base, options, adapter)
    data, samples = material.dataset, material.dataset.samples
    with reports_unsupported_dtype(base, name_of(model.dtype)):
        loss = mean_loss(model, samples, options.batch_size, pad_id(material.tokenizer, base)) if samples else None
        text = None if material.windows is None else measure_text(model, material.windows, reference)
    _require_numbers(base, {"the answers": loss, "the text": text.loss if text else None})
    if text is not None and reference is not None:
        _require_numbers(reference.checkpoint.root, {"the text": text.reference_loss})
    total = sum(parameter.numel() for parameter in empty_network(model.checkpoint).parameters())
    report = EvaluateReport(
        base=str(base),
        adapter=str(adapter.root) if adapter else None,
        shots=len(material.shots),
        fewer_shots=material.fewer_shots,
        compute_dtype=name_of(model.dtype),
        parameters=total,
        trained_parameters=trained_parameters(base, adapter, total),
        samples=len(samples),
        truncated=data.truncated,
        dropped=data.dropped,
        answer_tokens=sum(sample.answer_tokens for sample in samples),
        loss=loss,
        perplexity=None if loss is None else perplexity_of(loss),
        text=text,
        generated=None,
        answers={},
        own_template=material.own_template and bool(samples or options.prompts),
        trained_template=_other_template(base, adapter, options) if samples or options.prompts else None,
        without_template=material.tokenizer.chat_template is None and (data.has_conversations or bool(options.prompts)),
        unused={source.name: source.unused for source in data.sources if source.unused},
        twice=data.twice,
        special=data.special,
    )
    with reports_unsupported_dtype(base, name_of(model.dtype)):
        return _with_answers(report, model, material, options, on_answer)


def _other_template(base: Path, adapter: Adapter | None, options: EvaluateOptions) -> dict[str, Any] | None:
    """Return the chat template's variables of the training run if they differ from the present ones, else None."""
    trained = template_kwargs(base, adapter)
    return None if trained == options.chat_template_kwargs else trained


def _require_numbers(base: Path, losses: Mapping[str, float | None]) -> None:
    """Refuse to report a loss that is NaN or infinite.

    Raises:
        NonFiniteError: names what the loss was measured on.
    """
    for what, loss in losses.items():
        if loss is not None and not math.isfinite(loss):
            raise NonFiniteError(
                f"{base}: the loss on {what} is {loss}",
                hint=f"run: adaptkit verify {base}; or use --compute-dtype float32",
            )


def _with_answers(
    report: EvaluateReport,
    model: Model,
    material: EvaluationData,
    options: EvaluateOptions,
    on_answer: Callable[[GeneratedAnswer], None],
) -> EvaluateReport:
    """Answer the prompts and the data's questions, and score the latter."""

    def say(prompts: Sequence[Sequence[int]]) -> list[Generated]:
        return generate(
            model,
            material.tokenizer,
            prompts,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
        )

    said = say(material.prompts)
    answered = dict(zip(options.prompts, said, strict=True))
    report = replace(
        report,
        answers={prompt: found.text for prompt, found in answered.items()},
        cut_answers=tuple(prompt for prompt, found in answered.items() if not found.ended),
    )
    if not options.generate:
        return report
    found = say(material.question_prompts)
    for question, answer in zip(material.questions, found, strict=True):
        on_answer(GeneratedAnswer(report.label, question.messages, answer.text, question.references))
    references = [question.references for question in material.questions]
    generated = GenerationReport(
        questions=len(found),
        references=sum(map(len, references)),
        too_long=material.too_long,
        unfinished=sum(not answer.ended for answer in found),
        empty=sum(not answer.text for answer in found),
        scores=score([answer.text for answer in found], references),
    )
    return replace(report, generated=generated)
