"""Models of current families whose tensors are told by their names, so that nobody needs to ask transformers.

Their files hold the same tensors in every layer, and every matrix of a layer is the weight of a linear layer. For each
of them, a test compares the roles with those that transformers' own model gives.
"""

from collections.abc import Mapping
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
_ROPES = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The usual types of rotary embeddings, and what each must state."""
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
    if inside is None or not all(_count(number, config) for number in (layers, heads, features)):
        return False
    if layers > len(checkpoint.tensors):
        return False
    if not all(name.endswith("ForCausalLM") for name in class_names(config)) or not _is_usual(config):
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


def _is_usual(config: Mapping[str, Any]) -> bool:
    """Whether a configuration has only keys and values that such a model's class accepts for certain."""
    return all(key in _FREE or (key in _VALUES and _VALUES[key](value, config)) for key, value in config.items())


def _count(value: Any, config: Mapping[str, Any]) -> bool:
    return type(value) is int and 0 < value < 2**31


def _count_or_none(value: Any, config: Mapping[str, Any]) -> bool:
    return value is None or _count(value, config)


def _flag(value: Any, config: Mapping[str, Any]) -> bool:
    return type(value) is bool


def _number_or_none(value: Any, config: Mapping[str, Any]) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value < 1e9)


def _token(value: Any, config: Mapping[str, Any]) -> bool:
    several = value if isinstance(value, list) else [value]
    return all(one is None or (type(one) is int and 0 <= one < config.get("vocab_size", 0)) for one in several)


def _activation(value: Any, config: Mapping[str, Any]) -> bool:
    return value in ("silu", "gelu", "gelu_pytorch_tanh")


def _dtype(value: Any, config: Mapping[str, Any]) -> bool:
    return value in ("bfloat16", "float16", "float32")


def _absent(value: Any, config: Mapping[str, Any]) -> bool:
    return value in (None, False)


def _layer_types(value: Any, config: Mapping[str, Any]) -> bool:
    if not isinstance(value, list) or len(value) != config.get("num_hidden_layers"):
        return False
    return all(kind in ("full_attention", "sliding_attention") for kind in value)


def _flag_of_each_layer(value: Any, config: Mapping[str, Any]) -> bool:
    return (
        isinstance(value, list) and len(value) == config.get("num_hidden_layers") and {*map(repr, value)} <= {"0", "1"}
    )


def _rope(value: Any, config: Mapping[str, Any]) -> bool:
    if not isinstance(value, dict):
        return value is None
    if value.keys() == {"full_attention", "sliding_attention"}:
        return all(isinstance(part, dict) and _rope(part, config) for part in value.values())
    needed, numbers = _ROPES.get(str(value.get("rope_type"))), {**value, "rope_type": 1}
    if needed is None or not numbers.keys() >= set(needed):
        return False
    return all(type(number) in (int, float) and 0 < number < 1e9 for number in numbers.values())


_FREE = {"architectures", "model_type", "transformers_version", "_name_or_path", "_model_name_or_path"}
"""Keys that do not affect the network."""
_KEYS = {
    _count: "hidden_size intermediate_size num_attention_heads num_key_value_heads num_hidden_layers vocab_size "
    "max_position_embeddings pretraining_tp query_pre_attn_scalar original_max_position_embeddings "
    "_sliding_window_pattern sliding_window_pattern no_rope_layer_interval",
    _count_or_none: "head_dim sliding_window max_window_layers",
    _flag: "attention_bias mlp_bias tie_word_embeddings use_cache use_sliding_window",
    _number_or_none: "attention_dropout initializer_range rms_norm_eps rope_theta attn_logit_softcapping "
    "final_logit_softcapping embd_pdrop resid_pdrop attention_multiplier embedding_multiplier residual_multiplier "
    "logits_scaling",
    _token: "bos_token_id eos_token_id pad_token_id unk_token_id",
    _activation: "hidden_act hidden_activation",
    _dtype: "dtype torch_dtype",
    _layer_types: "layer_types",
    _flag_of_each_layer: "no_rope_layers",
    _absent: "use_bidirectional_attention",
    _rope: "rope_parameters rope_scaling",
}
_VALUES = {key: accepts for accepts, keys in _KEYS.items() for key in keys.split()}
