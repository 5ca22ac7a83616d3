"""PEFT's adapter folder, read completely or refused, and written.

    adapter_config.json          peft_type, r, lora_alpha, patterns, target_modules, ...
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, in), .lora_B.weight (out, r)

Every key of the file is used exactly once or named in an error. What this module does not know is refused by name.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptkit.checkpoint.compensation import read_compensation
from adaptkit.checkpoint.hashing import fingerprint
from adaptkit.checkpoint.header import FLOATS, TensorSpec
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import read_json, require_folder
from adaptkit.checkpoint.manifest import Manifest, TensorRecord, read_manifest
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.errors import AdapterError, NonFiniteError
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.lora import LowRank, scaling

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "modules_to_save",
    "lora_bias",
    "megatron_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
)
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "target_modules", "task_type",
}  # fmt: skip
"""Keys that say nothing about the change, or only what the tensors show anyway."""
_USED = {"alpha_pattern", "bias", "fan_in_fan_out", "lora_alpha", "r", "rank_pattern", "use_rslora"}
_FINISHED = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}
"""How A and B began; ``init_lora_weights`` says whether that matters."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initial adapters that peft balances by changing the base; a converted one says ``init_lora_weights: true``."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as files hold it.

    Attributes:
        root: its folder.
        config: ``adapter_config.json``.
        modules: by dotted path of the module, the change of its weight.
        fan_in_fan_out: whether the base keeps its weights transposed (GPT-2's Conv1D).
        compensation: by module, what it began with to make up for what quantizing its base lost; mostly empty.
        manifest: None if another tool made the adapter.
        records: its tensors with fingerprints.
    """

    root: Path
    config: Mapping[str, Any]
    modules: Mapping[str, LowRank]
    fan_in_fan_out: bool
    compensation: Mapping[str, LowRank]
    manifest: Manifest | None
    records: tuple[TensorRecord, ...]

    @property
    def only_compensates(self) -> bool:
        """Whether it is still what it began with, so that it says nothing about the 16-bit base."""
        return set(self.compensation) == set(self.modules) and all(
            torch.equal(begun.lora_a, self.modules[name].lora_a)
            and torch.equal(begun.lora_b, self.modules[name].lora_b)
            and begun.scaling == self.modules[name].scaling
            for name, begun in self.compensation.items()
        )


def is_adapter(root: Path) -> bool:
    """Whether a folder looks like an adapter."""
    return (root / CONFIG_NAME).is_file()


def read_adapter(root: Path) -> Adapter:
    """Read an adapter.

    Raises:
        UsageError: not a folder.
        AdapterError: not a LoRA adapter, something unsupported, or tensors that do not fit together.
        CheckpointError: a malformed file.
    """
    require_folder(root)
    if not is_adapter(root):
        raise AdapterError(f"{root}: not an adapter: there is no {CONFIG_NAME}", hint="give the adapter's folder")
    config = read_json(root / CONFIG_NAME)
    _check_config(root, config)
    if not (root / WEIGHTS_NAME).exists():
        pickled = " (a pickled .bin is not loaded: save it again with peft)" if list(root.glob("*.bin")) else ""
        raise AdapterError(f"{root}: there is no {WEIGHTS_NAME}{pickled}")
    files = TensorFiles(root, [WEIGHTS_NAME])
    halves: dict[str, dict[str, torch.Tensor]] = {}
    records = []
    for name, located in files.tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None or located.spec.dtype not in FLOATS or len(located.spec.shape) != 2:
            raise AdapterError(
                f"{root}: the tensor {name!r} ({located.spec.dtype}, {list(located.spec.shape)}) is none that is known",
                hint="only lora_A and lora_B of linear layers are supported",
            )
        tensor = files.read(name)
        if not all_finite(tensor):
            raise AdapterError(f"{root}: {name} holds NaN or infinity")
        halves.setdefault(match[1], {})[match[2]] = tensor
        records.append(TensorRecord(name, WEIGHTS_NAME, located.spec.dtype, located.spec.shape, fingerprint(tensor)))
    if not halves:
        raise AdapterError(f"{root}: the adapter holds no tensors")
    modules = {module: _low_rank(root, config, module, halves[module]) for module in sorted(halves)}
    manifest = read_manifest(root)
    return Adapter(
        root=root,
        config=config,
        modules=modules,
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        compensation=read_compensation(root, modules, manifest),
        manifest=manifest,
        records=tuple(records),
    )


def write_adapter(output: Output, modules: Mapping[str, LowRank], base_name: str, **config: Any) -> None:
    """Write configuration and weights of a LoRA adapter, as PEFT and vLLM read them.

    Args:
        output: the folder being written; file and tensor records are added to it.
        modules: by dotted path of the module; stored in float32.
        base_name: what ``base_model_name_or_path`` says.
        config: more keys of ``adapter_config.json``, or other values; ``target_modules`` is every module's whole path
            unless it is among them.

    Raises:
        NonFiniteError: a number is NaN or too large for float32; names the tensor.
    """
    ranks = {module: term.rank for module, term in modules.items()}
    alphas = {module: term.scaling * term.rank for module, term in modules.items()}
    common_rank, common_alpha = _most_common(ranks), _most_common(alphas)
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": common_rank,
        "lora_alpha": common_alpha,
        "rank_pattern": {f"^{re.escape(m)}$": r for m, r in ranks.items() if r != common_rank},
        "alpha_pattern": {f"^{re.escape(m)}$": a for m, a in alphas.items() if a != common_alpha},
        "target_modules": sorted(modules),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
    } | config
    output.write_json(CONFIG_NAME, document)
    tensors = {}
    for module, term in modules.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = term.lora_a.detach().float().cpu()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = term.lora_b.detach().float().cpu()
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{name}: NaN, or too large for float32", hint="use smaller weights")
    specs = [TensorSpec(name, "F32", tuple(tensors[name].shape)) for name in sorted(tensors)]
    with TensorWriter(output.folder, WEIGHTS_NAME, specs) as writer:
        for spec in specs:
            writer.write(spec.name, tensors[spec.name])
    output.add(writer.record, writer.tensors)


def _check_config(root: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{root}: a {kind} adapter, which is not supported", hint="only LORA adapters are")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise AdapterError(f"{root}: uses {key}, which is not supported", hint="merge it with peft itself")
    unknown = {key for key, value in config.items() if value} - _HARMLESS - _USED - _FINISHED
    if unknown:
        raise AdapterError(
            f"{root}: {CONFIG_NAME} has the key {min(unknown)!r}, whose meaning is not known",
            hint="remove it if it changes nothing, or merge with the tool that wrote it",
        )
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{root}: began with {begun}, which changes the base's weights: it does not belong to the original base",
            hint="save it with peft's path_initial_model_for_weight_conversion",
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{root}: trains biases (bias={config['bias']!r}), which is not supported")


def _low_rank(root: Path, config: Mapping[str, Any], module: str, halves: dict[str, torch.Tensor]) -> LowRank:
    missing = {"A", "B"} - set(halves)
    if missing:
        raise AdapterError(f"{root}: {module} has no lora_{missing.pop()}")
    lora_a, lora_b = halves["A"], halves["B"]
    try:
        rank = _pattern(config.get("rank_pattern") or {}, module, config.get("r"))
        alpha = _pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha"))
    except (re.error, AttributeError) as error:
        raise AdapterError(f"{root}: rank_pattern or alpha_pattern is malformed ({error})") from error
    if (
        not isinstance(rank, int)
        or isinstance(rank, bool)
        or rank < 1
        or lora_a.shape[0] != rank
        or lora_b.shape[1] != rank
    ):
        raise AdapterError(
            f"{root}: {module}: the configuration says rank {rank}, lora_A has {lora_a.shape[0]} rows and "
            f"lora_B {lora_b.shape[1]} columns"
        )
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= sys.float_info.max:
        raise AdapterError(f"{root}: {module}: lora_alpha is {alpha}; expected a positive number")
    return LowRank(lora_a, lora_b, scaling(float(alpha), rank, bool(config.get("use_rslora"))))


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's path."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _most_common(values: Mapping[str, Any]) -> Any:
    counted = list(values.values())
    best = max(sorted(set(counted)), key=counted.count)
    return int(best) if float(best).is_integer() else best
