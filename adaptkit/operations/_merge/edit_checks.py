"""What fits together: changes of one tensor, sizes of a vocabulary, an adapter's copy of a tensor and the base's."""

from adaptkit.checkpoint.reader import Checkpoint, TensorFiles
from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.lazy import torch
from adaptkit.operations._merge.edits import Edits
from adaptkit.operations._vocabulary import find_vocabulary


def check_sums(checkpoint: Checkpoint, edits: Edits) -> None:
    """Refuse combinations that are no sum of changes of the same base.

    Raises:
        UsageError: several adapters change a tensor in ways that cannot be summed.
        BaseMismatchError: embedding and head would differ in size.
    """
    for edit in edits.of.values():
        resized = edit.spec.shape != edit.base_shape
        columns = any(step.per_column and step.magnitude is not None for step in edit.steps)
        if (resized and len(edit.steps) > 1) or (columns and any(step.tokens for step in edit.steps)):
            raise UsageError(
                f"{edit.spec.name}: several adapters change it in ways that cannot be summed",
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
                f"embedding and head would differ in size: {', '.join(map(str, sorted(heights)))} entries",
                hint="save the adapter with save_embedding_layers=True",
            )


def is_same(checkpoint: Checkpoint, name: str, files: TensorFiles, key: str) -> bool:
    """Whether a tensor of an adapter is the base's, up to the adapter's coarser type; read piece by piece."""
    ours, theirs = checkpoint.spec(name), files.spec(key)
    if ours.shape != theirs.shape:
        return False
    step = 1 << 20
    for start in range(0, ours.count, step):
        count = min(step, ours.count - start)
        one, other = checkpoint.read_flat(name, start, count), files.read_flat(key, start, count)
        if not torch.equal(one.to(other.dtype), other):
            return False
    return True
