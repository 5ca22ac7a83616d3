"""Models of current families whose tensors are told by their names, so that nobody needs to ask transformers.

Their files hold the same tensors in every layer, and every matrix of a layer is the weight of a linear layer. For each
of them, a test compares the roles with those that transformers' own model gives.
"""

from typing import Any

from adaptkit.checkpoint.layout import class_names
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.operations._vocabulary import find_vocabulary

_ATTENTION = "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.o_proj.weight "
_BIASES = "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias "
_HEAD_NORMS = "self_attn.q_norm.weight self_attn.k_norm.weight "
_MLP = "mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight "
_FUSED = "self_attn.qkv_proj.weight self_attn.o_proj.weight mlp.gate_up_proj.weight mlp.down_proj.weight "
_NORMS = "input_layernorm.weight post_attention_layernorm.weight "
_MLP_NORMS = "pre_feedforward_layernorm.weight post_feedforward_layernorm.weight "
_AFTER = "post_attention_layernorm.weight post_feedforward_layernorm.weight "
_LLAMA = _ATTENTION + _MLP + _NORMS
USUAL_NAMES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA + _BIASES,
    "qwen3": _LLAMA + _HEAD_NORMS,
    "gemma": _LLAMA,
    "gemma2": _LLAMA + _MLP_NORMS,
    "gemma3_text": _LLAMA + _MLP_NORMS + _HEAD_NORMS,
    "granite": _LLAMA,
    "olmo2": _ATTENTION + _MLP + _AFTER + _HEAD_NORMS,
    "phi3": _FUSED + _NORMS,
    "smollm3": _LLAMA,
}
"""Maps ``model_type`` to the names of a layer's tensors, after ``model.layers.<n>.``."""
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def has_usual_names(checkpoint: Checkpoint) -> bool:
    """Whether the files hold exactly the tensors of a language model of one of these types, in the expected shapes.

    False for everything unusual, such as a missing tensor, a bias, or a layer that differs from the others.
    """
    config = checkpoint.config
    inside = USUAL_NAMES.get(str(config.get("model_type")))
    layers: Any = config.get("num_hidden_layers")
    heads: Any = config.get("num_attention_heads")
    features: Any = config.get("hidden_size")
    if inside is None or not all(type(number) is int and number > 0 for number in (layers, heads, features)):
        return False
    if layers > len(checkpoint.tensors) or not all(name.endswith("ForCausalLM") for name in class_names(config)):
        return False
    outside = {_EMBEDDING, _NORM} | (set() if find_vocabulary(checkpoint).tied else {_HEAD})
    layer = inside.split()
    if outside | {f"model.layers.{n}.{name}" for n in range(layers) for name in layer} != {*checkpoint.tensors}:
        return False
    shapes: dict[str, Any] = {name: (config.get("vocab_size"), features) for name in outside} | {_NORM: (features,)}
    first = {name: checkpoint.spec(f"model.layers.0.{name}").shape for name in layer}
    shapes |= {f"model.layers.{n}.{name}": first[name] for n in range(layers) for name in layer}
    queries = first.get("self_attn.q_proj.weight")
    if queries and queries[0] != heads * (config.get("head_dim") or features // heads):
        return False
    return all(checkpoint.spec(name).shape == shape for name, shape in shapes.items())
