"""Checks of planned edits: shapes, sums of changes, vocabulary sizes, an adapter's copies of the base's tensors."""

from collections.abc import Sequence
from pathlib import Path

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.reader import Checkpoint, TensorFiles
from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.lazy import torch
from adaptkit.networks.addressing import OTHER_MODEL
from adaptkit.numerics import lora
from adaptkit.numerics.dtypes import DTYPES
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations._merge.edits import Edits, Step
from adaptkit.operations._vocabulary import find_vocabulary


def check_shape(who: str, root: Path, spec: TensorSpec, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a change whose shape is not the tensor's.

    Args:
        who: adapter that changes the tensor, for messages.
        root: folder of the base.
        spec: header entry of the tensor in the result.
        name: name of the tensor in the base.
        shape: shape of the change.

    Raises:
        BaseMismatchError: names the tensor.
    """
    if spec.shape != shape:
        raise BaseMismatchError(
            f"{who}: the adapter expects shape {list(shape)} for {name}, but it is {list(spec.shape)} "
            f"({spec.dtype}) in {root}",
            hint=OTHER_MODEL,
        )


def check_sums(checkpoint: Checkpoint, edits: Edits) -> None:
    """Refuse combinations of changes that cannot be summed.

    Raises:
        UsageError: several adapters change a tensor in ways that cannot be summed.
        BaseMismatchError: embedding and head would differ in size.
    """
    for edit in edits.of.values():
        resized = edit.spec.shape != edit.base_shape
        columns = any(step.per_column and step.magnitude is not None for step in edit.steps)
        if (resized and len(edit.steps) > 1) or (columns and any(step.tokens for step in edit.steps)):
            raise UsageError(
                f"{edit.spec.name}: several adapters change this tensor in ways that cannot be added up",
                hint="merge one adapter after the other",
            )
    heights = {edit.spec.shape[0] for edit in edits.of.values() if edit.spec.shape != edit.base_shape}
    if "vocab_size" in edits.config:
        vocabulary = find_vocabulary(checkpoint)
        bias = f"{vocabulary.head.removesuffix('.weight')}.bias"
        names = {vocabulary.embedding, vocabulary.head, bias} & {*checkpoint.tensors, *edits.of}
        heights |= {(edits.of[name].spec if name in edits.of else checkpoint.spec(name)).shape[0] for name in names}
        if len(heights) > 1:
            raise BaseMismatchError(
                f"embedding and head would have different numbers of entries: {', '.join(map(str, sorted(heights)))}",
                hint="save the adapter again with save_pretrained(..., save_embedding_layers=True)",
            )


def check_effects(adapters: Sequence[Adapter], weights: Sequence[float], edits: Edits) -> None:
    """Refuse an adapter that changes nothing although its weight is not 0.

    Raises:
        UsageError: names the adapter.
    """
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        steps = (step for edit in edits.of.values() for step in edit.steps if step.adapter == number)
        if weight and not any(map(_changes_something, steps)):
            raise UsageError(
                f"{adapter.root}: changes nothing, since everything it adds is zero",
                hint="train it first, or leave it out",
            )


def _changes_something(step: Step) -> bool:
    """Return whether a step may change its tensor.

    Replacements and sums of several low-rank terms (as with compensation) count without looking at their values.
    """
    if step.magnitude is not None or step.whole is not None or step.tokens is not None:
        return True
    if step.bias is not None and bool(step.bias.any()):
        return True
    return any(len(terms) > 1 or lora.norm(term) > 0 for terms in step.panels for term in terms)


def check_quantizable(edits: Edits) -> None:
    """Refuse a merge that adds tensors or changes the configuration.

    Raises:
        UsageError: names the first addition or change.
    """
    if edits.added or edits.config:
        what = edits.added[0] if edits.added else next(iter(edits.config))
        raise UsageError(
            f"the merge changes {what}, which --format nf4 does not support",
            hint="merge first, then quantize the result",
        )


def is_same(checkpoint: Checkpoint, name: str, files: TensorFiles, key: str) -> bool:
    """Return whether an adapter's copy of a tensor equals the base's after rounding to one dtype; read piece by piece.

    That dtype is the copy's own, or the one in which the model was loaded before peft's
    ``prepare_model_for_kbit_training`` cast it to float32: a bfloat16 base is loaded in float16 where the GPU lacks
    bfloat16.
    """
    ours, theirs = checkpoint.spec(name), files.spec(key)
    if ours.shape != theirs.shape:
        return False
    step, through = 1 << 20, {DTYPES[theirs.dtype], torch.float16, torch.bfloat16}
    for start in range(0, ours.count, step):
        count = min(step, ours.count - start)
        one, other = checkpoint.read_flat(name, start, count), files.read_flat(key, start, count)
        through = {dtype for dtype in through if torch.equal(one.to(dtype).to(other.dtype), other)}
        if not through:
            return False
    return True


def copy_replaces_base(
    checkpoint: Checkpoint,
    allowed: bool,
    name: str,
    files: TensorFiles,
    key: str,
    *,
    otherwise: str = "add --allow-base-mismatch to use the adapter's copy",
) -> bool:
    """Whether an adapter's change is added to its own copy of a base tensor, since that differs from the base's.

    Args:
        checkpoint: the base.
        allowed: accept a copy of the same shape that differs.
        name: of the base's tensor.
        files: of the adapter.
        key: of the copy.
        otherwise: for the hint, what else the caller can do.

    Raises:
        BaseMismatchError: the copy differs, and that is not allowed.
    """
    if is_same(checkpoint, name, files, key):
        return False
    if checkpoint.spec(name).shape == files.spec(key).shape and not allowed:
        raise BaseMismatchError(
            f"{checkpoint.root}: {name} is not the tensor that {files.root} was trained on; the adapter's own copy of "
            "it differs",
            hint=f"give the right base, or {otherwise}",
        )
    return True
