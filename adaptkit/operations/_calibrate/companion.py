"""The companion adapter of a quantized base: where it is written, and how both are published together."""

from __future__ import annotations

import os
from pathlib import Path

from adaptkit.checkpoint.adapter import write_adapter
from adaptkit.checkpoint.compensation import write_compensation
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest, parent_of, read_manifest
from adaptkit.checkpoint.place import partial_folder
from adaptkit.checkpoint.writer import write_file
from adaptkit.errors import AdaptkitError, UsageError
from adaptkit.numerics.lora import LowRank


def check_apart(output: Path, companion: Path) -> None:
    """Refuse a companion adapter in the folder of its base, or vice versa."""
    one, other = (Path(os.path.realpath(folder)) for folder in (output, companion))
    for inner, outer in ((one, other), (other, one)):
        if inner.is_relative_to(outer) or inner.is_relative_to(partial_folder(outer)):
            raise UsageError(
                f"{companion}: the companion adapter needs a folder outside {output}",
                hint="choose another --init-adapter-output",
            )


def is_waiting(companion: Path, output: Path) -> bool:
    """Whether the companion adapter is published but its finished base is not, since the run ended in between."""
    try:
        adapter, base = read_manifest(companion), read_manifest(partial_folder(output))
    except AdaptkitError:
        return False
    return adapter is not None and base is not None and parent_of("base", base, ()) in adapter.parents


def publish_both(
    out: Output, manifest: Manifest, folder: Path, modules: dict[str, LowRank], force: bool, transposed: bool
) -> None:
    """Write the companion adapter, and publish both folders, one right after the other.

    Args:
        out: the base, completely written.
        manifest: of the base.
        folder: of the adapter.
        modules: the adapter's matrices, by dotted path.
        force: replace an existing adapter.
        transposed: whether the base stores its weights as (in, out).
    """
    write_file(out.folder, MANIFEST_NAME, manifest.to_bytes())  # see ``is_waiting``
    with Output(folder, manifest.sha256, force or is_waiting(folder, out.final)) as adapter:
        write_adapter(adapter, modules, out.final.name, fan_in_fan_out=transposed)
        write_compensation(adapter, modules)
        described = Manifest(
            kind="adapter",
            operation=manifest.operation,
            files=tuple(adapter.files),
            tensors=tuple(adapter.tensors),
            parents=(parent_of("base", manifest, ()),),
            targets=tuple(target for target in manifest.targets if target.module in modules),
        )
        adapter.publish(described)
        out.publish(manifest)
