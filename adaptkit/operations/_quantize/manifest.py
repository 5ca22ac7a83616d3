"""The manifest of a quantized checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

from adaptkit.checkpoint.hashing import tensors_root
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import Manifest, Parent, Target, TensorRecord, parent_of, read_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.released import ReleasedCheckpoint
from adaptkit.operations._quantize.plan import Plan


def make_manifest(out: Output, plan: Plan, recorded: dict[str, Any], source: Checkpoint | None) -> Manifest:
    """Describe a quantized checkpoint whose files are all written.

    Args:
        out: the folder being written; its notes hold what ``TensorPlan.assemble`` returned.
        plan: the plan.
        recorded: options.
        source: what was quantized; None if it is not a folder, which could have a manifest.

    Raises:
        IntegrityError: the source does not match its manifest.
    """
    notes = {choice.spec.name: out.notes[choice.spec.name] for choice in plan.selection.choices}
    digests = {name: note["fingerprint"] for name, note in notes.items()}
    base = [TensorRecord.of(choice.spec, digests[choice.spec.name]) for choice in plan.selection.choices]
    written = {tensor.name: tensor for tensor in out.tensors}
    targets = []
    for choice in plan.quantized():
        name = choice.spec.name
        root = tensors_root(written[spec.name] for spec in plan.groups[name].specs)
        targets.append(Target(choice.module, choice.spec.shape, digests[name], root))
    return Manifest(
        kind="quantized",
        operation={"name": "quantize", "options": recorded},
        files=tuple(out.files),
        tensors=tuple(out.tensors),
        parents=_parents(base, notes, source),
        targets=tuple(targets),
    )


def _parents(
    base: Sequence[TensorRecord], notes: Mapping[str, dict[str, Any]], source: Checkpoint | None
) -> tuple[Parent, ...]:
    """Return the 16-bit base and, if that was only computed, the release that it was decoded from."""
    if source is None:
        return (parent_of("base", None, base),)
    manifest = read_manifest(source.root)
    if not isinstance(source, ReleasedCheckpoint):
        return (parent_of("base", manifest, base, root=source.root),)
    digests = {name: digest for note in notes.values() for name, digest in note["parts"].items()}
    release = [TensorRecord.of(located.spec, digests[name]) for name, located in source.release.tensors.items()]
    return parent_of("base", None, base), parent_of("release", manifest, release, root=source.root)
