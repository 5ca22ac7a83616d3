"""What transformers says of a checkpoint's architecture, asked without weights and without memory.

transformers is optional: it comes with the extra ``train``.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from adaptkit.checkpoint.layout import CONFIG_NAME, class_names, read_config, text_config
from adaptkit.checkpoint.progress import counted
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError, UsageError
from adaptkit.lazy import torch
from adaptkit.torch_compiler import without_compiler

_LAYERS = re.compile(r"layers$|n_layer$|depths?$|num_blocks$")
_MANY = re.compile(r"experts$|^num_labels$")
"""Keys of ``config.json`` whose integers make that many modules, or entries of a list."""
_MOST = {"layers": 1_024, "others": 65_536}
"""What is built in a second whatever the files hold."""
REFUSALS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError, ImportError,
)  # fmt: skip
"""What transformers raises for what it cannot use, besides a ``StrictDataclassError`` for a wrong type."""
_NOT_OURS_TO_FOLLOW = {"quantization_config", "attn_implementation", "experts_implementation", "auto_map"}
"""What a configuration may not decide here; an implementation can be code on the Hub."""

_ONE_AT_A_TIME = threading.RLock()
"""While it builds a model, transformers sets torch's default type for the whole process, and then sets it back."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """transformers, without its advice on stderr; one thread at a time has it.

    Raises:
        UsageError: it is not installed.
    """
    try:
        # it puts another module in its place while it loads, of which a waiting thread's `import` would not know
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError("this needs the package transformers", hint="pip install 'adaptkit[train]'") from error
    with _ONE_AT_A_TIME:
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
        config: ``config.json``.
        tensors: none.
    """

    root: Path
    config: dict[str, Any]
    tensors: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> Self:
        """Read a folder's configuration.

        Raises:
            UsageError: there is no such folder, or no configuration in it.
            CheckpointError: it cannot be read.
        """
        if not (root / CONFIG_NAME).is_file():
            found = f"has no {CONFIG_NAME}" if root.is_dir() else "not a folder" if root.exists() else "does not exist"
            raise UsageError(f"{root}: {found}", hint="give a checkpoint's folder, or org/name on the Hub")
        return cls(root, read_config(root / CONFIG_NAME))

    @property
    def dtype(self) -> torch.dtype:
        """That the checkpoint says its weights have; bfloat16 if it does not say."""
        for values in (self.config, text_config(self.config)):
            for key in ("dtype", "torch_dtype"):
                found = getattr(torch, str(values.get(key)).removeprefix("torch."), None)
                if isinstance(found, torch.dtype):
                    return found
        return torch.bfloat16


def why_unknown(checkpoint: Checkpoint) -> str:
    """Why transformers cannot be asked about a checkpoint's architecture, in a few words; empty if it can."""
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return "transformers is not installed"
    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return f"transformers does not know model_type {textwrap.shorten(repr(kind), 60)}"
    return "" if _auto_class(CONFIG_MAPPING[kind]) else f"transformers has no language model of model_type {kind!r}"


def _auto_class(config: type) -> Any:
    """What builds a configuration's language model: one for text, or one that sees images too; None without either."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return next((c for c in (AutoModelForCausalLM, AutoModelForImageTextToText) if config in c._model_mapping), None)


def transformers_version() -> str:
    """The version of transformers, which must be installed."""
    with quiet_transformers() as transformers:
        return str(transformers.__version__)


def empty_network(checkpoint: Checkpoint | Description, dtype: torch.dtype | None = None) -> Any:
    """Build a checkpoint's causal language model on the meta device, with all that it has beside for images.

    Args:
        checkpoint: which.
        dtype: of its parameters, bfloat16 if None.

    Raises:
        UsageError: transformers does not know the architecture, or is not installed.
        CheckpointError: the configuration speaks of more layers than the file has tensors.
    """

    def language_model(config: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return (_auto_class(type(config)) or AutoModelForCausalLM).from_config(config, dtype=dtype or torch.bfloat16)

    return _build(checkpoint, language_model)


def named_network(checkpoint: Checkpoint | Description, first: Iterable[str] = ()) -> Any:
    """Build, as ``empty_network`` does, a model of the class that ``architectures`` in ``config.json`` names.

    That may be a classifier, or a model without a head, whose tensors have other names than the language model's.

    Args:
        checkpoint: which.
        first: names of classes that are preferred if transformers has them for this architecture.

    Returns:
        The model; None if no name is that of such a class, or transformers cannot build it.
    """
    own = class_names(checkpoint.config)
    names = [*first, *own]

    def named_model(config: Any) -> Any:
        for position, name in enumerate(names):
            found = _class_named(name, config)
            network = None if found is None else found._from_config(config, dtype=torch.bfloat16)
            if network is not None and (position < len(names) - len(own) or _is_of(network, checkpoint)):
                return network
        return None

    try:
        return _build(checkpoint, named_model)
    except UsageError:
        return None


def has_no_head(network: Any) -> bool:
    """Whether a model gives hidden states alone, as those of ``AutoModel`` do."""
    return network.base_model is network


def _is_of(network: Any, checkpoint: Checkpoint | Description) -> bool:
    """Whether files are of a class that has no head: not if their names are those of the model around it."""
    names = checkpoint.tensors
    return not has_no_head(network) or not names or any(name in network.state_dict() for name in names)


def _class_named(name: str, config: Any) -> Any:
    """The class of models that has a name, or that an automatic class of this name takes for a configuration."""
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


def _give_no_advice(input_ids: Any, attention_mask: Any) -> None:
    """Where a model as GPT-2 would advise to pass a mask, since its end token pads, too: there is one where it matters.

    Tokens at the end, as in training, are padding that no other token sees.
    """


def _build(checkpoint: Checkpoint | Description, build: Callable[[Any], Any]) -> Any:
    """Make a model of a checkpoint's configuration on the meta device.

    Raises:
        UsageError, CheckpointError: see ``empty_network``.
    """
    from huggingface_hub.errors import StrictDataclassError

    with quiet_transformers() as transformers:
        values = _plain(checkpoint.config)
        _check_counts(checkpoint, values)
        kind = values.pop("model_type", None)
        try:
            config = transformers.AutoConfig.for_model(kind, **values)
            with torch.device("meta"), without_compiler():
                network = build(config)
            if network is not None:
                network.tie_weights()  # which transformers 5.0 leaves to whoever loads weights
                network.base_model.warn_if_padding_and_no_attention_mask = _give_no_advice
            return network
        except (*REFUSALS, StrictDataclassError) as error:
            reason = textwrap.shorten(str(error), 200, placeholder=" …")  # may list every architecture there is
            raise UsageError(
                f"{checkpoint.root}: transformers cannot build a {kind!r} model ({reason})",
                hint="check its config.json, or try another release of transformers",
            ) from error


def language_part(network: Any) -> str:
    """The dotted path of what reads text in a network that sees images too; empty if that is the whole network."""
    inner = network.get_decoder() if hasattr(network, "get_decoder") else network
    is_stack = any(isinstance(module, torch.nn.ModuleList) for module in inner.modules())  # ModernBERT: its head
    if inner is network or inner is network.base_model or not is_stack:
        return ""
    return path_of(network, inner)


def head_path(network: Any) -> str:
    """The dotted path of a model's output layer; empty if it has none."""
    return path_of(network, network.get_output_embeddings())


def path_of(network: Any, module: Any) -> str:
    """The dotted path of a module in a network; empty if it is not there."""
    return next((path for path, found in network.named_modules() if found is module), "")


def asked_head(checkpoint: Checkpoint) -> str:
    """The dotted path of a checkpoint's output layer by transformers; empty if that is absent, or does not know it.

    It is for models whose output layer's name no table has; see ``checkpoint.vocabulary``. Loads transformers.

    Raises:
        UsageError, CheckpointError: ``config.json`` describes a model that cannot be built.
    """
    return "" if why_unknown(checkpoint) else head_path(named_network(checkpoint) or empty_network(checkpoint))


def _plain(value: Any) -> Any:
    """A configuration without what it may not decide, at any depth; infinities are as transformers 5 writes them."""
    if isinstance(value, dict):
        if list(value) == ["__float__"] and value["__float__"] in ("Infinity", "-Infinity"):
            return float(value["__float__"])
        return {
            key: _plain(item)
            for key, item in value.items()
            if key not in _NOT_OURS_TO_FOLLOW and not key.startswith("_")
        }
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _check_counts(checkpoint: Checkpoint | Description, value: Any, key: str = "") -> None:
    """Refuse numbers of modules that would take minutes, or all memory, to build.

    Raises:
        CheckpointError: names the key.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            _check_counts(checkpoint, item, name)
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
