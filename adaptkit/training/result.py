"""Write the result of a run: an adapter or a checkpoint, and the manifest that names its base."""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from adaptkit.checkpoint.adapter import Adapter, TokenRows, write_adapter
from adaptkit.checkpoint.compensation import write_compensation
from adaptkit.checkpoint.hashing import fingerprint_in_pieces
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import CONFIG_NAME, INDEX_NAME, name_of
from adaptkit.checkpoint.manifest import Manifest, Target, TensorRecord, parent_of, tensors_root
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.side_files import side_files
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.data.chat_template import TEMPLATE_NAME
from adaptkit.data.tokenizer_files import is_template
from adaptkit.errors import NonFiniteError
from adaptkit.models.addressing import Slice, find_addresses
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.tensors import DTYPES, as_array
from adaptkit.training.config import LOWER_THE_RATE, TrainConfig
from adaptkit.training.network.adapt import stack_changes
from adaptkit.training.network.model import Model


def write_result(
    out: Output,
    model: Model,
    config: TrainConfig,
    base: Manifest | None,
    records: Mapping[str, TensorRecord],
    start: Adapter | None,
    data_sha256: list[str],
    side_files: Mapping[str, bytes] = MappingProxyType({}),
) -> Manifest:
    """Write the trained weights and side files; return the manifest of everything in the folder.

    Args:
        out: the folder being written.
        model: the trained model.
        config: settings of the run, with the method resolved.
        base: manifest of the base; None if it has none.
        records: tensors of the base; see ``records_of``.
        start: adapter that the run started from; None if there is none.
        data_sha256: hashes of the data files.
        side_files: small files by name, written beside an adapter, or instead of a checkpoint's own.

    Raises:
        NonFiniteError: a weight is NaN, or too large for the dtype that it is stored in.
    """
    is_full = config.method == "full"
    if is_full:
        write_checkpoint(out, model, without=side_files)
    else:
        _write_adapter(out, model, config)
    for name, content in side_files.items():
        out.write(name, content)
    if start is not None and start.compensation:
        write_compensation(out, start.compensation)
    parents = [parent_of("base", base, () if base else tuple(records.values()))]
    if start is not None:
        parents.append(parent_of("init", start.manifest, start.records, root=start.root))
    return Manifest(
        kind="checkpoint" if is_full else "adapter",
        operation={"name": "train", "options": config.recorded() | {"data_sha256": data_sha256}},
        files=tuple(out.files),
        tensors=tuple(out.tensors),
        parents=tuple(parents),
        targets=() if is_full else _targets(model, base, records),
    )


def _write_adapter(out: Output, model: Model, config: TrainConfig) -> None:
    layers = model.adapted()
    changes = model.changes()
    experts = stack_changes(model)
    extra: dict[str, Any] = {"lora_dropout": config.dropout, "fan_in_fan_out": model.stores_transposed}
    ends = {name.rpartition(".")[2] for name in changes}
    named = {path for path, _ in model.network.named_modules() if path.rpartition(".")[2] in ends}
    if changes and named == set(changes):  # the usual form, equivalent to all paths
        extra["target_modules"] = sorted(ends)
    saved = {name: whole.value() for name, whole in model.whole.items()}
    biases = {n for n in saved if n.endswith(".bias") and f"{n.removesuffix('.bias')}.weight" not in saved}
    if set(saved) - biases:
        modules = {name.rpartition(".")[0] for name in set(saved) - biases}
        extra["modules_to_save"] = sorted(modules)
        # peft replaces whole modules, so it also needs a tied head's bias or a router's buffer.
        beside = [name for name in model.assembly.sources if name.rpartition(".")[0] in modules and name not in saved]
        saved |= {name: model.assembly.read(name) for name in beside}
    if biases:
        extra["bias"] = config.bias if config.bias != "none" else "all"
    write_adapter(
        out,
        changes,
        name_of(Path(config.base)),
        saved={name: as_array(value) for name, value in saved.items()},
        magnitudes={name: as_array(layer.magnitude) for name, layer in layers.items() if layer.magnitude is not None},
        lora_biases={name: as_array(layer.lora_bias) for name, layer in layers.items() if layer.lora_bias is not None},
        tokens={
            path: TokenRows(tuple(trained.indices.tolist()), as_array(trained.rows))
            for path, trained in model.rows.items()
        },
        experts=experts,
        use_rslora=config.rslora,
        **extra,
    )


def _targets(model: Model, base: Manifest | None, records: Mapping[str, TensorRecord]) -> tuple[Target, ...]:
    """Return the base's weights that have a low-rank change, each with the hash that identifies it."""
    known = base.known_weights() if base else {}
    targets = []
    for name, change in model.changes().items():
        target, (file_name, *_) = known.get(name), model.assembly.sources[f"{name}.weight"]
        if target is None and file_name in model.assembly.quantized:
            parts = [records[part] for part in model.assembly.quantized[file_name].parts]
            target = Target(name, change.shape, quantized_root=tensors_root(parts))
        elif target is None:
            target = Target(name, records[file_name].shape, records[file_name].xxh3_128)
        targets.append(target)
    return tuple(targets)


def write_checkpoint(out: Output, model: Model, without: Collection[str]) -> None:
    """Write the base's checkpoint with the trained weights, each in the base's dtype and file.

    Args:
        out: the folder being written.
        model: model with every parameter trained in full.
        without: small files of the base not to copy; if a chat template is among them, none of the base's is copied.

    Raises:
        NonFiniteError: a weight is NaN, or too large for its dtype.
    """
    checkpoint = model.checkpoint
    addresses = find_addresses(checkpoint, model.whole, "training")
    pieces = {slice_.name: (name, slice_) for name, slices in addresses.of.items() for slice_ in slices}
    for file, header in checkpoint.headers.items():
        with TensorWriter(out.folder, file, [spec for spec, _ in header.tensors], header=header.raw) as writer:
            for spec, _ in header.tensors:
                value = checkpoint.read(spec.name)
                if spec.name in pieces:
                    name, slice_ = pieces[spec.name]
                    value = as_array(_part(model.whole[name].value(), slice_).to("cpu", DTYPES[spec.dtype]))
                    if not all_finite(value):
                        raise NonFiniteError(f"{spec.name}: is NaN, or too large for {spec.dtype}", hint=LOWER_THE_RATE)
                writer.write(spec.name, value)
        out.add(writer.record, writer.tensors)
    own = {CONFIG_NAME: checkpoint.root / CONFIG_NAME, INDEX_NAME: checkpoint.root / INDEX_NAME}
    for name, path in (own | side_files(checkpoint.root)).items():
        is_replaced = name in without or (is_template(name) and TEMPLATE_NAME in without)
        if path.is_file() and not is_replaced:
            out.copy(path, name)


def _part(value: Tensor, slice_: Slice) -> Tensor:
    """Return the part of a parameter that one tensor in the files holds."""
    matrix = value if slice_.expert is None else value[slice_.expert]
    number, count = slice_.part
    return matrix.chunk(count)[number] if count > 1 else matrix


def records_of(checkpoint: Checkpoint, base: Manifest | None) -> dict[str, TensorRecord]:
    """Return the base's tensors by name, from its manifest or, without one, by reading and hashing all of them."""
    if base is not None:
        return {record.name: record for record in base.tensors}
    specs = {name: located.spec for name, located in checkpoint.tensors.items()}
    return {name: TensorRecord.of(spec, fingerprint_in_pieces(checkpoint, name)) for name, spec in specs.items()}
