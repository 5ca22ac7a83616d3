"""The files of a Hugging Face checkpoint folder.

config.json                              architecture, and quantization_config
model.safetensors                        one file, or
model-00001-of-00003.safetensors ...     shards, with
model.safetensors.index.json             {"metadata": {"total_size"}, "weight_map": {tensor: file}}
tokenizer.json, chat_template.jinja ...  side files, copied unchanged
additional_chat_templates/*.jinja        the only side files in a subfolder
modeling_x.py, configuration_x.py        side files if a configuration has an auto_map; copied, never run
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from adaptkit.arguments import AnyPath, folder_hint, path_hint
from adaptkit.checkpoint.foreign import VALUE_HEADS, WEIGHTS_BESIDE, refuse_other_weights
from adaptkit.checkpoint.header import check_regular
from adaptkit.documents import REPAIR, strict_json
from adaptkit.errors import CheckpointError, UnsafeInputError, UsageError
from adaptkit.wording import first_few

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CARD_NAME = "README.md"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
JOURNAL_NAME = "adaptkit-journal.jsonl"
COMPENSATION_NAME = "adaptkit-compensation.safetensors"
"""File beside an adapter; see ``compensation``."""
METRICS_NAME, PICTURE_NAME = "metrics.jsonl", "loss.svg"
"""Files beside a training result: the run's metrics, and its loss curve."""

_LONGEST_PATH, _LONGEST_NAME_BYTES = 1024, 255
MAX_SMALL_FILE_BYTES = 256 << 20
"""Limit on a file that is read as a whole."""
_MOST_LEVELS = 100
NOT_SIDE_PREFIXES = ("adaptkit-", "adapter_", "trainer_", "optimizer", ".")
"""Prefixes of the names of files that are neither weights nor side files."""
_GET_INDEX = "download or copy the checkpoint again"


def resolve_inside(root: Path, name: str) -> Path:
    """Return the path of a file named in another file. Every such name must be resolved by this function.

    Raises:
        UnsafeInputError: the name is absolute, leaves the folder, is too long, or has characters that no artifact
            needs; or a part of the path is a link to something other than a file.
    """
    parts = PurePosixPath(name).parts
    plain = name.isprintable() and "\\" not in name and ":" not in name and name == "/".join(parts)
    if not plain or not parts or ".." in parts or name.startswith(("/", "~")):
        raise UnsafeInputError(
            f"{root}: the path {name!r} is not a plain path inside its folder", hint="do not trust this artifact"
        )
    if len(name) > _LONGEST_PATH or max(len(part.encode()) for part in parts) > _LONGEST_NAME_BYTES:
        raise UnsafeInputError(
            f"{root}: the path {name[:40]!r}… of {len(name)} characters is longer than file systems allow",
            hint="do not trust this artifact",
        )
    path = root / name
    for part in [path, *path.parents][: len(parts)]:
        if part.is_symlink() and not part.is_file():
            raise UnsafeInputError(f"{path}: is a link, but not to a file", hint="put a file in its place")
    return path


def name_of(folder: Path) -> str:
    """Return the name by which artifacts refer to a folder: in huggingface_hub's cache, the repository's org/name."""
    resolved = folder.resolve()
    cached = resolved.parent.parent.name
    if resolved.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/", 1)
    return Path(os.path.abspath(folder)).name


def require_folder(path: Path, hint: Callable[[AnyPath], str] = folder_hint) -> Path:
    """Return the path if it is a folder.

    Raises:
        UsageError: it is an unfinished output, or a file, or does not exist, for which ``hint`` makes the hint.
    """
    if not os.path.isdir(path):  # Path.is_dir raises if a name is too long
        expected = "expected a checkpoint or adapter folder"
        if not os.path.exists(path):
            raise UsageError(f"{path}: does not exist; {expected}", hint=hint(path))
        belongs = any(os.path.isfile(path.parent / name) for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME))
        raise UsageError(
            f"{path}: is a file; {expected}", hint=f"give its folder, {path.parent}" if belongs else path_hint(path)
        )
    if os.path.lexists(path / JOURNAL_NAME):
        resume = "wait for its command; if it was interrupted, run the same command again to resume"
        raise UsageError(f"{path}: is an unfinished output", hint=resume)
    return path


def read_small(path: Path) -> bytes:
    """Read a whole file that is small; a CheckpointError if it could exhaust memory, or is not a regular file."""
    check_regular(path)
    size = path.stat().st_size
    if size > MAX_SMALL_FILE_BYTES:
        raise CheckpointError(
            f"{path}: {size:,} bytes is too large for such a file", hint="download or copy it again, or remove it"
        )
    return path.read_bytes()


def read_json(path: Path, infinities: bool = False) -> dict[str, Any]:
    """Read a JSON object; a CheckpointError if it is not a regular file, too large, or nested too deeply."""
    value = strict_json(read_small(path), str(path), infinities)
    level: list[Any] = [value]
    for _ in range(_MOST_LEVELS):
        level = [part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer)]
        level = [part for part in level if isinstance(part, dict | list)]
    if level:  # recursive functions could not handle it
        raise CheckpointError(f"{path}: is nested more than {_MOST_LEVELS} levels deep", hint=REPAIR)
    return value


def read_config(path: Path) -> dict[str, Any]:
    """Read a model's configuration, which may contain infinities: some architectures have them as defaults."""
    return read_json(path, infinities=True)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``text_config``, the configuration of the language model inside a multimodal one; empty if missing."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Return the model classes in a configuration's ``architectures``, in order; the first one is the main one."""
    named = config.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def write_json(value: Mapping[str, Any]) -> bytes:
    """Return the bytes of a readable JSON file: keys sorted, indented by two spaces."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # an unpaired surrogate as \ud800, which is also JSON's escape


def is_adapter(root: Path) -> bool:
    """Return whether a folder has an ``adapter_config.json``."""
    return (root / ADAPTER_CONFIG_NAME).is_file()


def has_checkpoint(root: Path) -> bool:
    """Return whether a folder has a checkpoint's weights; it may hold an adapter, too."""
    return (root / SINGLE_NAME).exists() or (root / INDEX_NAME).exists()


def weight_files(root: Path) -> tuple[list[str], dict[str, str] | None]:
    """List the safetensors files of a checkpoint, and return the index's weight map, or None without an index.

    Raises:
        CheckpointError: no weights, weights in another format, two sets of weights, or a malformed index.
    """
    require_folder(root)
    if (index := root / INDEX_NAME).exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map must map tensor names to files", hint=_GET_INDEX)
        files = sorted(set(weight_map.values()))
        folded = Counter(file.casefold() for file in files)
        for file in files:
            resolve_inside(root, file)
            if folded[file.casefold()] > 1:
                raise CheckpointError(f"{index}: shard {file!r} differs from another only in case", hint=_GET_INDEX)
            if "/" in file or not file.endswith(".safetensors") or file.startswith("adaptkit-"):
                raise CheckpointError(f"{index}: {file!r} is not the name of a shard beside it", hint=_GET_INDEX)
        if (root / SINGLE_NAME).exists() and SINGLE_NAME not in weight_map.values():
            raise CheckpointError(
                f"{root}: has {SINGLE_NAME} as well as {INDEX_NAME} with other shards; readers differ on these",
                hint="remove the one that is not meant to be used",
            )
        return files, weight_map
    if (root / SINGLE_NAME).exists():
        return [SINGLE_NAME], None
    refuse_other_weights(root, (p.name for p in root.iterdir() if not p.name.startswith(NOT_SIDE_PREFIXES)))
    beside = sorted(name for name in (*WEIGHTS_BESIDE, *VALUE_HEADS) if (root / name).exists())
    shards = {p.name for p in root.glob("*.safetensors") if not p.name.startswith(NOT_SIDE_PREFIXES)} - {*beside}
    found = [*sorted(shards), *beside]
    whole = "the adapter or checkpoint that it was saved with" if beside else "config.json and the weights"
    if shards:
        hint = f"if these are shards, add {INDEX_NAME}; if transformers wrote one file, rename it {SINGLE_NAME}"
    elif is_adapter(root):
        hint = "this is an adapter: give its base, or merge it into the base first"
    else:
        hint = look_below(root, f"pass the folder that contains {whole}", models=True)
    raise CheckpointError(
        f"{root}: not a checkpoint: neither {SINGLE_NAME} nor {INDEX_NAME}{f', but {found[0]}' if found else ''}",
        hint=hint,
    )


def look_below(root: Path, otherwise: str, models: bool) -> str:
    """Return a hint that lists adapters in subfolders, where trainers save them; also checkpoints if ``models``.

    Returns ``otherwise`` if there are none.
    """
    found = sorted(
        path.name
        for path in root.iterdir()
        if os.path.isfile(path / ADAPTER_CONFIG_NAME) or (models and os.path.isfile(path / CONFIG_NAME))
    )
    return f"pass a folder inside it: {first_few(found)}" if found else otherwise


def shard_name(number: int, total: int) -> str:
    """Return the name of the number-th shard (from 1) of ``total``."""
    return SINGLE_NAME if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def index_bytes(files: Iterable[tuple[str, str]], total_size: int) -> bytes:
    """Return the index file's bytes, given (tensor, file) pairs and the tensors' total size in bytes."""
    return write_json({"metadata": {"total_size": total_size}, "weight_map": dict(files)})
