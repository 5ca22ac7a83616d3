"""Architectures of checkpoints by transformers, as networks on the meta device, without weights or memory.

transformers is optional: it comes with the extra ``train``.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from adaptkit.arguments import folder_hint
from adaptkit.checkpoint.layout import CONFIG_NAME, class_names, read_config, text_config
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError, UsageError, install_hint
from adaptkit.wording import counted

if TYPE_CHECKING:
    import torch

_LAYERS = re.compile(r"layers$|n_layer$|depths?$|num_blocks$|attention_types$")
_MANY = re.compile(r"experts$|^num_labels$")
"""Keys of ``config.json`` whose integers are numbers of modules to build, or of entries of a list."""
_MOST = {"layers": 1_024, "others": 65_536}
"""Numbers that are accepted whatever the files hold, since so many are built in a second."""
BUILD_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError, ImportError,
)  # fmt: skip
"""Errors that transformers raises for unusable input, besides a ``StrictDataclassError`` for a value of wrong type."""
_IGNORED_KEYS = {"quantization_config", "attn_implementation", "experts_implementation", "auto_map"}
"""Keys of a configuration that are ignored; an implementation can be code on the Hub."""

_LOCK = threading.RLock()
"""Held while transformers builds a model, since it changes torch's default dtype for the whole process meanwhile."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Import transformers, without its warnings on stderr while the block runs; blocks other threads meanwhile.

    Raises:
        UsageError: transformers is not installed.
    """
    try:
        # It replaces itself in sys.modules while it loads; an `import` waiting in another thread would miss that.
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError("this needs the package transformers", hint=install_hint("train")) from error
    with _LOCK:
        before = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            yield transformers
        finally:
            transformers.logging.set_verbosity(before)


@dataclass(frozen=True)
class Description:
    """A checkpoint of which only the configuration is known.

    Attributes:
        root: the folder.
        config: content of ``config.json``.
        tensors: always empty.
    """

    root: Path
    config: dict[str, Any]
    tensors: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> Self:
        """Read a folder's configuration.

        Raises:
            UsageError: there is no such folder, or no configuration in it.
            CheckpointError: the configuration cannot be read.
        """
        if not (root / CONFIG_NAME).is_file():
            found = f"has no {CONFIG_NAME}" if root.is_dir() else f"neither a folder nor a {CONFIG_NAME}"
            hint = f"give a checkpoint's folder, its {CONFIG_NAME}, or org/name on the Hub"
            if not root.exists():
                found, hint = "does not exist", folder_hint(root)
            raise UsageError(f"{root}: {found}", hint=hint)
        return cls(root, read_config(root / CONFIG_NAME))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights according to the configuration; bfloat16 if it does not give one."""
        import torch  # here and below: it takes long to load, and most commands build no network

        for values in (self.config, text_config(self.config)):
            for key in ("dtype", "torch_dtype"):
                found = getattr(torch, str(values.get(key)).removeprefix("torch."), None)
                if isinstance(found, torch.dtype):
                    return found
        return torch.bfloat16


def why_unsupported(checkpoint: Checkpoint) -> str:
    """Return a short reason why transformers cannot build a checkpoint's architecture; empty if it can."""
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return "transformers is not installed"
    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return f"transformers does not know model_type {textwrap.shorten(repr(kind), 60)}"
    return "" if _auto_class(CONFIG_MAPPING[kind]) else f"transformers has no language model of model_type {kind!r}"


def _auto_class(config: type) -> Any:
    """Return the auto class that builds a configuration's language model, for text or for text and images, or None."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return next((c for c in (AutoModelForCausalLM, AutoModelForImageTextToText) if config in c._model_mapping), None)


def transformers_version() -> str:
    """Return the version of transformers, which must be installed."""
    with quiet_transformers() as transformers:
        return str(transformers.__version__)


def empty_network(checkpoint: Checkpoint | Description, dtype: torch.dtype | None = None) -> Any:
    """Build a checkpoint's causal language model, including a vision part, on the meta device.

    Args:
        checkpoint: the checkpoint, or its description.
        dtype: dtype of the parameters; bfloat16 if None.

    Raises:
        UsageError: transformers is not installed, does not know the architecture, or cannot build it.
        CheckpointError: the configuration gives a number of layers or other modules that is too large to build.
    """

    def language_model(config: Any, bfloat16: torch.dtype) -> Any:
        from transformers import AutoModelForCausalLM

        return (_auto_class(type(config)) or AutoModelForCausalLM).from_config(config, dtype=dtype or bfloat16)

    return _build(checkpoint, language_model)


def named_network(checkpoint: Checkpoint | Description, first: Iterable[str] = ()) -> Any:
    """Build, on the meta device, a model of the class that ``architectures`` in ``config.json`` names.

    That may be a classifier or a model without a head, whose tensors have other names than the language model's.

    Args:
        checkpoint: the checkpoint, or its description.
        first: names of classes to prefer, if transformers has them for this architecture.

    Returns:
        The model; None if transformers has no class of these names for the architecture, or cannot build it.

    Raises:
        CheckpointError: as in ``empty_network``.
    """
    own = class_names(checkpoint.config)
    names = [*first, *own]

    def named_model(config: Any, bfloat16: torch.dtype) -> Any:
        for position, name in enumerate(names):
            found = _class_named(name, config)
            network = None if found is None else found._from_config(config, dtype=bfloat16)
            if network is not None and (position < len(names) - len(own) or _fits_files(network, checkpoint)):
                return network
        return None

    try:
        return _build(checkpoint, named_model)
    except UsageError:
        return None


def has_no_head(network: Any) -> bool:
    """Whether a model has no head and returns only hidden states, as those of ``AutoModel`` do."""
    return network.base_model is network


def _fits_files(network: Any, checkpoint: Checkpoint | Description) -> bool:
    """Whether the files' names fit a model without a head: they do not if they have the prefix of a model with one.

    Returns true for a model with a head, and if there are no names.
    """
    names = checkpoint.tensors
    return not has_no_head(network) or not names or any(name in network.state_dict() for name in names)


def _class_named(name: str, config: Any) -> Any:
    """Return the model class of this name, or the class that an auto class of this name selects for ``config``.

    None if there is none, or it does not fit the configuration.
    """
    import transformers

    found: Any = getattr(transformers, name, None)
    if not isinstance(found, type):
        return None
    mapping = getattr(found, "_model_mapping", None)
    if mapping is not None:
        found = mapping.get(type(config), None)
        found = found[0] if isinstance(found, tuple) else found
    fits = found is not None and issubclass(found, transformers.PreTrainedModel)
    return found if fits and isinstance(config, found.config_class or ()) else None


def _skip_padding_warning(input_ids: Any, attention_mask: Any) -> None:
    """Replace a model's warning that padding was found without an attention mask.

    Models such as GPT-2, whose end token is also their padding, would warn. A mask is passed where it matters; in
    training, padding comes last and no other token attends to it.
    """


def _build(checkpoint: Checkpoint | Description, build: Callable[[Any, torch.dtype], Any]) -> Any:
    """Build a model from a checkpoint's configuration on the meta device.

    Raises:
        UsageError, CheckpointError: see ``empty_network``.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError

    with quiet_transformers() as transformers:
        values = _plain(checkpoint.config)
        _check_counts(checkpoint, values)
        kind = values.pop("model_type", None)
        try:
            config = transformers.AutoConfig.for_model(kind, **values)
            with torch.device("meta"), torch.random.fork_rng([]):  # Diffllama draws numbers
                network = build(config, torch.bfloat16)
            if network is not None:
                network.base_model.warn_if_padding_and_no_attention_mask = _skip_padding_warning
            return network
        except (*BUILD_ERRORS, StrictDataclassError) as error:
            reason = textwrap.shorten(str(error), 200, placeholder=" …")  # may list every architecture
            hint = "check its config.json, or try another release of transformers"
            if sys.flags.optimize > 1:
                hint = "run Python without -OO and PYTHONOPTIMIZE=2: transformers reads docstrings, which they remove"
            raise UsageError(
                f"{checkpoint.root}: transformers cannot build a {kind!r} model ({reason})", hint=hint
            ) from error


def language_part(network: Any) -> str:
    """Return the dotted path of the text part of a network with a vision part; empty if the whole network is text."""
    from torch import nn

    inner = network.get_decoder() if hasattr(network, "get_decoder") else network
    is_stack = any(isinstance(module, nn.ModuleList) for module in inner.modules())  # ModernBERT's is its head
    if inner is network or inner is network.base_model or not is_stack:
        return ""
    return path_of(network, inner)


def head_path(network: Any) -> str:
    """Return the dotted path of a model's output layer; empty if it has none."""
    return path_of(network, network.get_output_embeddings())


def path_of(network: Any, module: Any) -> str:
    """Return the dotted path of a module in a network; empty if it is not there."""
    return next((path for path, found in network.named_modules() if found is module), "")


def find_head_path(checkpoint: Checkpoint) -> str:
    """Return the dotted path of a checkpoint's output layer; empty if transformers is absent or does not know it.

    For models whose output layer is not in the tables of ``checkpoint.vocabulary``. Imports transformers.

    Raises:
        UsageError, CheckpointError: ``config.json`` describes a model that cannot be built.
    """
    return "" if why_unsupported(checkpoint) else head_path(named_network(checkpoint) or empty_network(checkpoint))


def _plain(value: Any) -> Any:
    """Drop ignored and private keys at any depth, and decode infinities as transformers 5 writes them."""
    if isinstance(value, dict):
        if list(value) == ["__float__"] and value["__float__"] in ("Infinity", "-Infinity"):
            return float(value["__float__"])
        return {key: _plain(item) for key, item in value.items() if key not in _IGNORED_KEYS and key[:1] != "_"}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _check_counts(checkpoint: Checkpoint | Description, value: Any, key: str = "") -> None:
    """Check that no number of modules is so large that building them would take minutes or exhaust memory.

    Raises:
        CheckpointError: a number is too large; the message names its key.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            _check_counts(checkpoint, item, name)
    elif isinstance(value, list):
        for item in value:
            _check_counts(checkpoint, item, key)
    elif isinstance(value, int):
        most = math.inf
        if _LAYERS.search(key):
            most = max(len(checkpoint.tensors), _MOST["layers"])
        elif _MANY.search(key):
            most = _MOST["others"]
        if value > most:
            found = len(checkpoint.tensors)
            raise CheckpointError(
                f"{checkpoint.root}: config.json says {key} = {value}; its files hold {counted(found, 'tensor')}",
                hint="restore the config.json that belongs to this checkpoint",
            )
