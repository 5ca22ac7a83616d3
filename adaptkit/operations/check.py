"""Predict whether other programs would accept an adapter or a checkpoint, and what to change if not."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaptkit.arguments import AnyPath, as_path, as_path_or_none, as_texts
from adaptkit.checkpoint.foreign import mlx_hint, pickled_weights, weights_beside
from adaptkit.checkpoint.layout import ADAPTER_WEIGHTS_NAME, class_names, has_checkpoint, is_adapter, require_folder
from adaptkit.discovery import load, names
from adaptkit.errors import UsageError
from adaptkit.operations import targets as registry
from adaptkit.operations.targets._adapter_files import AdapterFiles, read_adapter_files
from adaptkit.operations.targets._base_shapes import read_base_shapes
from adaptkit.operations.targets._checkpoint_files import CheckpointFiles, read_checkpoint_files
from adaptkit.operations.targets._target import Finding, Program
from adaptkit.wording import counted, first_few


@dataclass(frozen=True)
class Verdict:
    """Whether one program accepts the files.

    Attributes:
        target: name.
        reader: the program and the version whose source code the rules come from; other versions may differ.
        taken: whether it accepts the files and computes what they mean; warnings state conditions.
        findings: errors first.
    """

    target: str
    reader: str
    taken: bool
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class CheckReport:
    """Whether several programs accept the files.

    Attributes:
        path: folder.
        kind: adapter, quantized or checkpoint.
        taken: whether all of them accept it.
        verdicts: one per program.
        examined: what the verdicts are based on.
        unknown: what they do not cover.
    """

    path: str
    kind: str
    taken: bool
    verdicts: tuple[Verdict, ...]
    examined: tuple[str, ...]
    unknown: tuple[str, ...]


def check(path: AnyPath, targets: str | Sequence[str] = (), base: AnyPath | None = None) -> CheckReport:
    """Judge an adapter or a checkpoint by its configuration, names and shapes; no weights are read.

    Args:
        path: folder of an adapter or checkpoint that any tool wrote.
        targets: names of programs; all known ones if empty.
        base: folder of an adapter's base, to compare modules and shapes with.

    Raises:
        UsageError: not a folder, no such target, or a base given for a checkpoint.
        CheckpointError: neither an adapter nor a checkpoint, or a file that cannot be read at all.
    """
    path = as_path(path, "path")
    base = as_path_or_none(base, "base")
    require_folder(path)
    chosen = list(dict.fromkeys(as_texts(targets, "targets"))) or names(registry)
    programs: dict[str, Program] = {name: load(registry, name, "TARGET") for name in chosen}
    if is_adapter(path) or (path / ADAPTER_WEIGHTS_NAME).exists():
        adapter = read_adapter_files(path)
        if base is not None:
            modules = tuple(pair.module for pair in adapter.pairs)
            adapter = replace(adapter, base=read_base_shapes(base, adapter.config, modules))
        other = _mlx_findings(adapter)
        found = {name: other or program.findings(adapter) for name, program in programs.items()}
        return _report(path, "adapter", programs, found, _examined(adapter), _unknown(adapter))
    if base is not None:
        raise UsageError(f"{path}: not an adapter, so --base does not apply", hint="leave out --base")
    checkpoint = read_checkpoint_files(path)
    kind = "quantized" if checkpoint.quantization else "checkpoint"
    found = {name: program.findings(checkpoint) for name, program in programs.items()}
    return _report(path, kind, programs, found, _examined_checkpoint(checkpoint), _unknown_checkpoint(checkpoint))


def _mlx_findings(files: AdapterFiles) -> tuple[Finding, ...]:
    """Return the only finding for an adapter in MLX's format, which no target supports; empty for other adapters."""
    way = mlx_hint(files.root, files.config)
    found = "adapter_config.json is in MLX's format (lora_parameters, but no peft_type)"
    return (Finding("error", found, "only adapters in peft's layout are supported", way),) if way else ()


def _report(
    path: Path,
    kind: str,
    programs: Mapping[str, Program],
    found: Mapping[str, Iterable[Finding]],
    examined: tuple[str, ...],
    unknown: tuple[str, ...],
) -> CheckReport:
    verdicts = []
    for name, findings in found.items():
        ordered = tuple(sorted(findings, key=lambda finding: finding.level))  # "error" comes before "warning"
        is_taken = all(finding.level != "error" for finding in ordered)
        verdicts.append(Verdict(name, programs[name].version, is_taken, ordered))
    return CheckReport(str(path), kind, all(verdict.taken for verdict in verdicts), tuple(verdicts), examined, unknown)


def _examined(files: AdapterFiles) -> tuple[str, ...]:
    seen = [
        "adapter_config.json",
        f"names and shapes of {counted(len(files.keys), 'tensor')} in {counted(len(files.pairs), 'adapted module')}",
    ]
    if files.base is not None:
        seen.append(f"names and shapes of {counted(len(files.base.shapes), 'weight')} of {files.base.root}")
    return tuple(seen)


def _unknown(files: AdapterFiles) -> tuple[str, ...]:
    unknown = ["whether the program supports adapters for the base's architecture", "the weights' values"]
    if files.base is None:
        unknown.insert(0, "whether the base has these modules in these shapes (give --base)")
    elif any(pair.stacked for pair in files.pairs):
        unknown.insert(0, "whether stacks of experts fit the base")
    if beside := weights_beside(files.root):
        unknown.insert(0, f"the contents of {beside}, which none of these programs reads")
    if has_checkpoint(files.root):
        unknown.insert(0, "the checkpoint in the same folder")
    if files.pickle:
        unknown.insert(0, f"the contents of {files.pickle}")
    else:
        unknown = [*_pickled(files.root), *unknown]
    if str(files.config.get("peft_type")).upper() != "LORA":
        unknown.insert(0, "rules for adapter types other than LoRA")
    return tuple(unknown)


def _examined_checkpoint(files: CheckpointFiles) -> tuple[str, ...]:
    packed = (f"quantization states of {counted(len(files.packed), 'quantized weight')}",) if files.packed else ()
    compared = (f"names and shapes of all tensors of {files.architecture}",) if files.architecture else ()
    return ("config.json", "names of files and tensors", *packed, *compared)


def _unknown_checkpoint(files: CheckpointFiles) -> tuple[str, ...]:
    name = next(iter(class_names(files.config)), "of an unnamed class")
    return (*_pickled(files.root), f"whether the program supports the architecture {name}", "the weights' values")


def _pickled(root: Path) -> tuple[str, ...]:
    names = pickled_weights(root)
    return (f"the contents of {first_few(names)}, which other programs may load",) if names else ()
