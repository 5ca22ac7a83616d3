"""What a run's adapter begins as: fresh matrices, or those of an adapter that is there already."""

from collections.abc import Mapping
from pathlib import Path

from adaptkit.checkpoint.adapter import Adapter, read_adapter, require_plain
from adaptkit.checkpoint.manifest import Manifest, Target
from adaptkit.errors import BaseMismatchError
from adaptkit.training.config import INITS, TrainConfig
from adaptkit.training.model import Model, attach_adapter, new_adapter


def read_start(config: TrainConfig, base: Manifest | None) -> Adapter | None:
    """Read the adapter that a run is to begin with, if it is to.

    Args:
        config: of the run.
        base: the manifest of the quantized base.

    Raises:
        BaseMismatchError: that adapter belongs to another base.
        AdapterError: it cannot be read.
    """
    if config.init in INITS:
        return None
    adapter = read_adapter(Path(config.init))
    require_plain(adapter, "go on training")
    for module, expected in _targets(adapter.manifest).items():
        found = _targets(base).get(module)
        differs = found is None or expected.base_xxh3_128 not in (None, found.base_xxh3_128)
        if adapter.compensation:  # it makes up for these very codes
            differs = differs or found is None or expected.quantized_root != found.quantized_root
        if base is not None and differs:
            raise BaseMismatchError(
                f"{adapter.root}: belongs to another base than {config.base}: {module} differs",
                hint="begin with an adapter for this base",
            )
    if adapter.compensation and (base is None or adapter.manifest is None):
        silent = config.base if base is None else adapter.root
        raise BaseMismatchError(
            f"{adapter.root}: makes up for the quantization of one base, and {silent} has no manifest to tell which",
            hint="give the folder that quantize made together with this adapter",
        )
    return adapter


def begin(model: Model, config: TrainConfig, start: Adapter | None) -> None:
    """Give a model the adapter that it begins with.

    Raises:
        UsageError: a target matches no layer.
        BaseMismatchError: the adapter to begin with does not fit the model.
    """
    if start is None:
        new_adapter(model, config.targets, config.rank, config.alpha, config.init, config.dropout, config.seed)
    else:
        attach_adapter(model, start.modules, str(start.root), config.dropout)


def _targets(manifest: Manifest | None) -> Mapping[str, Target]:
    return {target.module: target for target in manifest.targets} if manifest else {}
