"""The base that an adopted adapter is said to be trained on."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.foreign import hint_for_plain, quantization_found
from adaptkit.checkpoint.integrity import check_config
from adaptkit.checkpoint.manifest import Manifest, Parent, Target, TensorRecord, parent_of, read_manifest
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, CheckpointError
from adaptkit.operations._merge.edit_checks import copy_replaces_base
from adaptkit.operations._merge.edit_plan import plan_edits
from adaptkit.operations._threads import fingerprints


class AdoptedBase:
    """The base of an adapter, and which of its tensors the adapter changes.

    Args:
        root: folder of a 16- or 32-bit checkpoint, or of the quantized base whose error the adapter compensates for.
        adapter: the adapter.

    Raises:
        CheckpointError: the base is quantized, but should not be.
        BaseMismatchError: the adapter does not fit the base.
        IntegrityError: the base's configuration is not what its manifest says.
    """

    def __init__(self, root: Path, adapter: Adapter) -> None:
        self.checkpoint = Checkpoint(root) if adapter.compensation else plain_checkpoint(root)
        self._state = self.checkpoint.state()
        self._manifest = read_manifest(root)
        check_config(root, self._manifest)
        self._compensated = _compensated(root, self._manifest, adapter) if adapter.compensation else {}
        self.changed = sorted(self._compensated) or _changed(self.checkpoint, adapter)

    def fingerprints(self, threads: int, progress: Progress) -> dict[str, str]:
        """Hash all tensors.

        Raises:
            IntegrityError: a file changed since it was opened.
        """
        found = fingerprints(self.checkpoint, threads, progress)
        self.checkpoint.require_state(self._state)
        return found

    def parents(self, digests: Mapping[str, str]) -> tuple[Parent, ...]:
        """The base, described by all its tensors, which must be those of its manifest if it has one."""
        records = [TensorRecord.of(at.spec, digests[name]) for name, at in self.checkpoint.tensors.items()]
        return (parent_of("base", self._manifest, records, root=self.checkpoint.root),)

    def targets(self, digests: Mapping[str, str]) -> tuple[Target, ...]:
        """The tensors that the adapter changes."""
        return tuple(self._compensated.values()) or tuple(
            Target(name.removesuffix(".weight"), self.checkpoint.spec(name).shape, digests[name])
            for name in self.changed
        )


def _changed(base: Checkpoint, adapter: Adapter) -> list[str]:
    """Return, sorted, the names of the tensors of a base that an adapter changes."""
    replaces = partial(copy_replaces_base, base, False, otherwise="leave out --base")
    edits = plan_edits(base, [adapter], [1.0], replaces, True)
    return sorted({edit.source for edit in edits.of.values() if edit.steps})


def _compensated(root: Path, base: Manifest | None, adapter: Adapter) -> dict[str, Target]:
    """Map the modules of an adapter that compensates for the error of a quantized base to targets of that base.

    Raises:
        BaseMismatchError: the base has no manifest that lists such a quantized weight; names it.
    """
    known = base.known_weights() if base else {}
    for module, change in adapter.modules.items():
        shape = change.shape[::-1] if adapter.fan_in_fan_out else change.shape
        if module not in known or known[module].shape != shape:
            raise BaseMismatchError(
                f"{adapter.root}: compensates for the error of another base than {root}, which has no manifest that "
                f"lists a quantized {module} of that shape",
                hint="give the folder that quantize made together with this adapter, or leave out --base",
            )
    return {module: known[module] for module in sorted(adapter.modules)}


def plain_checkpoint(root: Path) -> Checkpoint:
    """Open a checkpoint.

    Raises:
        CheckpointError: it is quantized.
    """
    checkpoint = Checkpoint(root)
    method = quantization_found(checkpoint)
    if method is not None:
        raise CheckpointError(f"{root}: is quantized with {method}", hint=hint_for_plain(method, root, "give"))
    return checkpoint
