"""What each tensor of a checkpoint is: a linear layer's weight, a norm, an embedding, an expert.

For the models in ``_usual_names``, names say it. Otherwise, if transformers knows the architecture, the model is built
without weights, and its modules determine which tensors are the weights of linear layers. For all other models, names
and shapes do: a matrix in a numbered layer (``….layers.7.….weight``) is linear unless its name says otherwise. Names
also determine the kinds of all other tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptkit.checkpoint.layout import class_names
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.vocabulary import is_in_layers, is_usual_head
from adaptkit.models.architecture import (
    empty_network,
    head_path,
    named_network,
    transformers_version,
    why_unsupported,
)
from adaptkit.models.kinds import is_router
from adaptkit.models.linears import is_linear
from adaptkit.models.naming import TensorPlace, missing_parameters, places, shape_in
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations._usual_names import has_usual_names
from adaptkit.operations._vocabulary import find_vocabulary
from adaptkit.wording import counted

if TYPE_CHECKING:
    from torch import nn

_EXPERTS = re.compile(r"^(?:.*?\.)?experts(?=\.)")
_EXPERTS_WITHOUT_THE_WORD = re.compile(r"\.(block_sparse_moe|mlp)\.(in|out)put_linear\.weight$")
"""The end of names, in files, of Granite's and JetMoe's stacks of experts."""
_TABLE = re.compile(r"embed|relative_attention_bias|(^|\.)(wte|wpe)(\.|$)")
_LOOKED_UP = re.compile(
    r"(^|\.)(embed_tokens|[a-z_]*embeddings?|embed_positions|relative_attention_bias|wte|wpe|embed_in)$"
)
_NORM = re.compile(r"(^|\.)(ln_[^.]*|[^.]*norm[^.]*)$", re.IGNORECASE)
_FLOAT32 = re.compile(r"\.(indexer\.weights_proj|DenseReluDense\.wo)$")
_OWN_LINEAR_MODELS = {"falcon"}  # their layers are a subclass of nn.Linear that bitsandbytes does not quantize
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)$")
CONV1D_MODELS = {"gpt2", "openai-gpt"}
"""Types of models whose linear layers are Conv1D, which stores its weight as (in, out)."""
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of configurations for the number of experts in a layer."""
_LINEAR_BY_NAME = {
    "linear",
    "conv1d",
    "head",
    "router",
    "outside the layers",
    "float32 by its architecture",
    "shared by several layers",
}


@dataclass(frozen=True)
class Role:
    """What a tensor is.

    Attributes:
        kind: ``linear``, ``conv1d``, ``head``, ``expert``, or a phrase that says why it is none of these.
        is_linear: whether some program that loads the file may use a linear layer for it.
        paths: dotted paths that such programs may use for the tensor's module.
    """

    kind: str
    is_linear: bool
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Roles:
    """What the tensors of a checkpoint are.

    Attributes:
        of: maps the name of each tensor to its role.
        read_from: phrase that says how the roles were determined.
        head: path of the output layer in the model.
        tied: whether the head is the embedding.
    """

    of: Mapping[str, Role]
    read_from: str
    head: str
    tied: bool


def find_roles(checkpoint: Checkpoint) -> Roles:
    """Return the roles of a checkpoint's tensors; imports transformers only for models that are not ``_usual_names``.

    Raises:
        UsageError: ``config.json`` describes a model that cannot be built.
        CheckpointError: it describes more layers than there are tensors.
    """
    if has_usual_names(checkpoint):
        return roles_by_name(checkpoint, f"usual for {checkpoint.config['model_type']}")
    unknown = why_unsupported(checkpoint)
    return roles_by_name(checkpoint, unknown) if unknown else roles_by_architecture(checkpoint)


def _is_conv1d(model_type: str, module: str) -> bool:
    """Whether a module is, by its name, a Conv1D of the GPT-2 family, whose weight is stored as (in, out)."""
    return model_type in CONV1D_MODELS and bool(_CONV1D.search(module))


def roles_by_name(checkpoint: Checkpoint, reason: str) -> Roles:
    """Determine the roles of a checkpoint's tensors from names and shapes.

    Args:
        checkpoint: unquantized.
        reason: phrase that says why the architecture was not used.
    """
    model_type = str(checkpoint.config.get("model_type"))
    roles = {name: _by_name(located.spec, model_type) for name, located in checkpoint.tensors.items()}
    heads = [name.removesuffix(".weight") for name, role in roles.items() if role.kind == "head"]
    tied = find_vocabulary(checkpoint).tied
    return Roles(roles, f"names and shapes ({reason})", heads[0] if heads else "lm_head", tied)


def _by_name(spec: TensorSpec, model_type: str) -> Role:
    module = spec.name.removesuffix(".weight")
    experts = _EXPERTS.match(spec.name)
    is_other = spec.name.endswith("bias") or is_router(module)  # JetMoe has routers in modules named "experts"
    if experts and len(spec.shape) in {2, 3} and not is_other:
        return Role("expert", True, (experts[0],))
    if len(spec.shape) == 3 and _EXPERTS_WITHOUT_THE_WORD.search(spec.name):
        return Role("expert", True, (module,))
    kind = _kind_by_name(spec, module, model_type)
    is_listed = kind in _LINEAR_BY_NAME or (kind == "embedding" and not _LOOKED_UP.search(module))
    return Role(kind, is_listed, (module,))


def _kind_by_name(spec: TensorSpec, module: str, model_type: str) -> str:
    is_bias = spec.name.endswith("bias") and len(spec.shape) in {1, 2}
    rules = (
        (is_bias, "bias"),
        (not spec.name.endswith(".weight"), "not a weight"),
        (bool(_NORM.search(module)), "norm"),
        (len(spec.shape) != 2, "not a matrix"),
        (is_usual_head(module), "head"),
        (bool(_TABLE.search(module)), "embedding"),
        (is_router(module), "router"),
        (not is_in_layers(module), "outside the layers"),
        (model_type in _OWN_LINEAR_MODELS, "not a linear layer"),
        (bool(_FLOAT32.search(module)), "float32 by its architecture"),
        (_is_conv1d(model_type, module), "conv1d"),
    )
    return next((kind for applies, kind in rules if applies), "linear")


def roles_by_architecture(checkpoint: Checkpoint) -> Roles:
    """Determine the roles by the modules of the model that transformers builds.

    Raises:
        UsageError: ``config.json`` describes a model that cannot be built.
        CheckpointError: it describes more layers than there are tensors.
    """
    network = empty_network(checkpoint)
    head = network.get_output_embeddings()
    found = places(network, checkpoint.tensors)
    shared = _shared_modules(network)
    model_type = str(checkpoint.config.get("model_type"))
    roles, unplaced = {}, 0
    for name, located in checkpoint.tensors.items():
        role = _by_name(located.spec, model_type)
        if name in found and shape_in(network, found[name]) in (None, located.spec.shape):
            role = _in_network(network, head, found[name], role, shared)
        else:
            unplaced += 1
        roles[name] = role
    read_from = f"architecture {type(network).__name__} (transformers {transformers_version()})"
    if unplaced:
        read_from += (
            f"; names and shapes for {counted(unplaced, 'tensor')} that it does not have, or has in another shape"
        )
    missing, named = _missing_parameters(checkpoint, network, found)
    if missing:
        absent = f"{counted(len(missing), 'tensor')} of {named}, such as {missing[0]}"
        read_from += f"; the files lack {absent}, which loaders initialize at random"
    tied = head is not None and head.weight is network.get_input_embeddings().weight
    return Roles(roles, read_from, head_path(network) or "lm_head", tied)


def _missing_parameters(
    checkpoint: Checkpoint, network: Any, found: Mapping[str, TensorPlace]
) -> tuple[list[str], str]:
    """Return the parameters that the class named in ``architectures`` has but the files lack, and the class's name.

    If transformers cannot build that class, the language model is compared instead, but its head is not reported.
    """
    name = type(network).__name__
    said = class_names(checkpoint.config)
    if not said or name in said:
        return missing_parameters(network, found), name
    named = named_network(checkpoint)
    if named is not None:
        return missing_parameters(named, places(named, checkpoint.tensors)), type(named).__name__
    head = network.get_output_embeddings()
    parameters = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return [n for n in missing_parameters(network, found) if id(network.get_parameter(n)) not in parameters], name


def _shared_modules(network: Any) -> dict[str, list[str]]:
    """Map the path of each module with a tied weight to the paths of all that share it, head and embedding included."""
    groups: dict[str, list[str]] = {}
    for name, source in network.all_tied_weights_keys.items():
        groups.setdefault(source.removesuffix(".weight"), []).append(name.removesuffix(".weight"))
    return {path: [source, *others] for source, others in groups.items() for path in [source, *others]}


def _in_network(
    network: Any, head: nn.Module | None, place: TensorPlace, role: Role, shared: Mapping[str, list[str]]
) -> Role:
    """Return the role of a tensor whose place in the model is known; ``role`` is the one that its name suggests."""
    modules = [name.removesuffix(".weight") for name in place.parameters if name.endswith(".weight")]
    owners = [network.get_submodule(module) for module in modules]
    if not any(is_linear(owner) for owner in owners):
        kind = "not a linear layer" if role.kind in _LINEAR_BY_NAME - {"router"} else role.kind
        return Role(kind, kind in {"router", "expert"}, role.paths)
    paths = tuple(dict.fromkeys([*role.paths, *modules]))
    if place.pattern:
        return Role("reshaped by transformers while loading", True, paths)
    if owners[0] is head:
        return Role("head", True, paths)
    if role.kind == "router":
        return Role("router", True, paths)
    if modules[0] in shared:
        return Role("shared by several layers", True, tuple(dict.fromkeys([*paths, *shared[modules[0]]])))
    if _stays_in_float32(network, modules[0]):
        return Role("float32 by its architecture", True, paths)
    from torch import nn  # here, since most commands build no network

    return Role("linear" if isinstance(owners[0], nn.Linear) else "conv1d", True, paths)


def _stays_in_float32(network: Any, module: str) -> bool:
    """Whether transformers keeps a linear layer in float32 even if the list of modules to skip does not name it."""
    patterns = getattr(network, "_keep_in_fp32_modules", None) or ()
    return any(re.match(rf"(?:{pattern})(?:\.|$)", module) or module.endswith(pattern) for pattern in patterns)


def expert_count(config: Mapping[str, Any]) -> int | None:
    """Return the number of experts in a layer; None if the configuration does not say."""
    said = [config.get(name) for name in _EXPERT_COUNTS]
    return next((count for count in said if isinstance(count, int)), None)


def stores_transposed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a plain checkpoint stores a weight (or a module's weight) as (in, out): Conv1D in the GPT-2 family."""
    return _is_conv1d(str(checkpoint.config.get("model_type")), name.removesuffix(".weight"))
