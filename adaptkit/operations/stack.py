"""Combine adapters into one adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptkit.checkpoint.adapter import Adapter, read_adapter, write_adapter
from adaptkit.checkpoint.hashing import tensors_root
from adaptkit.checkpoint.journal import Output, check_output
from adaptkit.checkpoint.manifest import Manifest, Target, parent_of
from adaptkit.discovery import load
from adaptkit.errors import AdapterError, UsageError
from adaptkit.numerics import stacking
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._method import Method
from adaptkit.operations._terms import check_weights, expected_fingerprints


@dataclass(frozen=True)
class StackOptions:
    """How to stack.

    Attributes:
        method: name of a stacking method.
        weights: one per adapter; empty means 1 for each.
    """

    method: str = "cat"
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class StackReport:
    """What was done.

    Attributes:
        output: folder.
        method: that combined the adapters.
        modules: number of them in the result.
        ranks: smallest and largest rank of a module.
        tensors_root: binds the result's tensors.
        manifest_sha256: of the result's manifest.
    """

    output: str
    method: str
    modules: int
    ranks: tuple[int, int]
    tensors_root: str
    manifest_sha256: str


def stack(
    adapters: Sequence[Path], output: Path, options: StackOptions | None = None, *, force: bool = False
) -> StackReport:
    """Write one adapter that stands for several.

    Args:
        adapters: folders, at least two, in order.
        output: folder to make.
        options: how.
        force: replace an existing output.

    Raises:
        AdapterError: shapes or layouts of the adapters differ.
        BaseMismatchError: they were trained on different bases.
        UsageError: fewer than two, or another number of weights.
        OutputExistsError: the output exists.
    """
    options = options or StackOptions()
    method: Method = load(stacking, options.method, "METHOD")
    if len(adapters) < 2:
        raise UsageError("stacking takes at least two adapters")
    weights = options.weights or (1.0,) * len(adapters)
    read = [read_adapter(path) for path in adapters]
    check_weights(read, weights)
    expected_fingerprints(read)
    modules = {name: method.combine(terms) for name, terms in _terms(read, weights).items()}
    check_output(output, force, adapters)
    recorded = {"method": options.method, "source": method.source, "weights": list(weights)}
    with Output(output, [[tensors_root(a.records) for a in read], recorded], force) as out:
        base_names = {str(adapter.config.get("base_model_name_or_path")) for adapter in read}
        extra = {"fan_in_fan_out": read[0].fan_in_fan_out}
        write_adapter(out, modules, base_names.pop() if len(base_names) == 1 else "", **extra)
        manifest = Manifest(
            kind="adapter",
            operation={"name": "stack", "options": recorded},
            files=tuple(out.files),
            tensors=tuple(out.tensors),
            parents=tuple(
                parent_of("adapter", adapter.manifest, adapter.records, weight)
                for adapter, weight in zip(read, weights, strict=True)
            ),
            targets=_targets(read),
        )
        out.publish(manifest)
    ranks = [module.rank for module in modules.values()]
    return StackReport(
        str(output), options.method, len(modules), (min(ranks), max(ranks)), manifest.tensors_root, manifest.sha256
    )


def _terms(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[LowRank]]:
    terms: dict[str, list[LowRank]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter.compensation:
            raise AdapterError(
                f"{adapter.root}: began with what makes up for the quantization of its base, which counts only once",
                hint="merge it onto the 16-bit base",
            )
        if adapter.fan_in_fan_out != adapters[0].fan_in_fan_out:
            raise AdapterError(f"{adapter.root} and {adapters[0].root} are for bases that store weights differently")
        for module, low_rank in adapter.modules.items():
            found = terms.setdefault(module, [])
            if found and found[0].shape != low_rank.shape:
                raise AdapterError(
                    f"{module} is {list(found[0].shape)} in one adapter and {list(low_rank.shape)} in {adapter.root}"
                )
            found.append(low_rank.weighted(weight))
    return dict(sorted(terms.items()))


def _targets(adapters: Sequence[Adapter]) -> tuple[Target, ...]:
    """What the result needs of a base: known only if every adapter says what it was trained on."""
    if any(adapter.manifest is None for adapter in adapters):
        return ()
    found: dict[str, Target] = {}
    for adapter in adapters:
        for target in adapter.manifest.targets if adapter.manifest else ():
            found.setdefault(target.module, target)
    return tuple(found.values())
