"""The companion adapter of a quantized base: where it goes, and how both appear together."""

from __future__ import annotations

import os
from pathlib import Path

from adaptkit.checkpoint.adapter import write_adapter
from adaptkit.checkpoint.compensation import write_compensation
from adaptkit.checkpoint.journal import Output, partial_folder
from adaptkit.checkpoint.manifest import Manifest, parent_of
from adaptkit.errors import UsageError
from adaptkit.numerics.lora import LowRank


def check_apart(output: Path, companion: Path) -> None:
    """Refuse a companion adapter in the folder of its base, or the other way round."""
    one, other = (Path(os.path.realpath(folder)) for folder in (output, companion))
    for inner, outer in ((one, other), (other, one)):
        if inner.is_relative_to(outer) or inner.is_relative_to(partial_folder(outer)):
            raise UsageError(
                f"{companion}: the companion adapter needs a folder of its own, apart from {output}",
                hint="choose another --init-adapter-output",
            )


def publish_both(
    out: Output, manifest: Manifest, folder: Path, modules: dict[str, LowRank], force: bool, transposed: bool
) -> None:
    """Write the companion adapter, and let both folders appear, one right after the other.

    Args:
        out: the base, all written.
        manifest: of the base.
        folder: of the adapter.
        modules: by dotted path.
        force: replace an existing adapter.
        transposed: whether the base keeps its weights as (in, out).
    """
    with Output(folder, manifest.sha256, force) as adapter:
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
        # Killed in between, the same command with --force finds the base all but finished.
        adapter.publish(described)
        out.publish(manifest)
