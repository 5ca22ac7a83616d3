"""Every tensor of an adapter is used exactly once, or the error names the problem."""

import contextlib
import re

import peft
import peft_adapters
import pytest
import torch
from folders import edited_tensors
from peft_adapters import CASES, CONFIG, PREFIX, WEIGHTS, change_config, change_tensors, keys_of
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.errors import BaseMismatchError, UnsafeInputError, UsageError
from adaptkit.operations.merge import MergeOptions, merge

KINDS = [
    "linear_patterns", "linear_as_parameter", "conv1d", "embedding", "embedding_tied_ensured", "head_tied", "dora",
    "dora_embedding", "lora_bias", "biases_all_lora_bias", "saved_mlp", "saved_both_tied", "resized_phi",
    "resized_embedding", "tokens_both", "tokens_resized", "experts_mixtral", "experts_qwen3_fused", "experts_up_only",
    "experts_transposed", "experts_weight", "experts_saved", "experts_one_by_one_qwen3", "router", "router_saved",
    "everything_phi", "everything_qwen2_moe",
]  # fmt: skip
LAYER = "model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"
EXPERTS = f"{LAYER}.mlp.experts"
COPIES = (".original_module.weight", ".modules_to_save.weight", ".original_module.bias", ".modules_to_save.bias")
"""peft saves these copies in addition where it also saves embeddings, or all biases."""


@pytest.fixture
def changed(made, copy_of):
    """A case with a copy of its adapter that may be changed."""

    def make(name):
        case = peft_adapters.make(made, name)
        return case, copy_of(case.adapter)

    return make


@contextlib.contextmanager
def kept(adapter):
    """Restore an adapter's files afterwards."""
    before = {path: path.read_bytes() for path in (adapter / CONFIG, adapter / WEIGHTS)}
    yield
    for path, content in before.items():
        path.write_bytes(content)


def refuse(case, adapter, tmp_path, *names):
    """Merging must fail with a line that names one of ``names`` and a hint, and leave nothing."""
    options = MergeOptions(untie=True) if case.case.untied else MergeOptions()
    with pytest.raises((UnsafeInputError, BaseMismatchError)) as caught:
        merge(case.base, [adapter], tmp_path / "out", options)
    message, hint = caught.value.message, caught.value.hint
    assert any(name in message for name in names), f"{message!r} names none of {names}"
    assert hint
    assert "\n" not in message + hint
    assert list(tmp_path.glob("out*")) == []


def module_of(key):
    """Return the path of the module that a tensor belongs to, without peft's prefix and suffix."""
    parts = r"\.(lora_|base_layer|token_adapter|modules_to_save|original_module|weight$|bias$|gate_up_proj$|down_proj$)"
    return re.split(parts, key.removeprefix(PREFIX))[0]


def names_of(key):
    """Return what a message may call a tensor: its module, or that module as transformers names it."""
    module = module_of(key)
    vocabulary = {"vocab", "embedding", "embed_tokens", "lm_head"}  # if one is missing, the message may name the other
    sizes = vocabulary if "embed" in module or "lm_head" in module else set()
    return {module, module.replace(".mlp.", ".block_sparse_moe.")} | sizes


def one_of_each_kind(adapter):
    """Return the first key of every kind of tensor; those of the head, embeddings and norms are separate kinds."""
    found = {}
    for key in keys_of(adapter):
        part = key.removeprefix(PREFIX).removeprefix(module_of(key))
        found.setdefault((part, "lm_head" in key, "embed" in key, "norm" in key), key)
    return list(found.values())


# No tensor is ignored


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_recorded_and_used_exactly_once(made, name):
    """They are counted: two per LoRA, one of everything else; copies do not count."""
    adapter = peft_adapters.make(made, name).adapter
    read, keys = read_adapter(adapter), keys_of(adapter)
    assert sorted(record.name for record in read.records) == keys
    used = 2 * len(read.modules) + 2 * len(read.experts)
    used += sum(map(len, (read.magnitudes, read.biases, read.replaced, read.base_copies, read.tokens)))
    if name not in ("everything_phi", "tokens_resized_tied"):
        assert used == len([key for key in keys if not key.endswith(COPIES)])


@pytest.mark.parametrize(
    ("name", "stray", "like"),
    [
        ("linear", f"{Q}.lora_magnitude_vector", "rows"),
        ("lora_bias", f"{LAYER}.self_attn.o_proj.lora_B.bias", "rows"),
        ("linear", f"{Q}.lora_B.bias", "rows"),
        ("linear", f"{Q}.weight", "square"),  # peft has no place for it: the module is wrapped
        ("linear", f"{Q}.lora_embedding_A", "square"),
        ("experts_up_only", f"{EXPERTS}.base_layer.lora_A.weight", "square"),
        ("experts_mixtral", f"{EXPERTS}.lora_magnitude_vector", "rows"),
        ("tokens", "lm_head.token_adapter.trainable_tokens_delta", "square"),
        ("embedding", "model.embed_tokens.lora_A.weight", "square"),
    ],
)
def test_a_tensor_that_the_configuration_does_not_imply_is_named_in_the_error(changed, tmp_path, name, stray, like):
    case, adapter = changed(name)
    tensor = torch.ones(64) if like == "rows" else torch.ones(64, 64)
    change_tensors(adapter, lambda tensors: tensors.update({PREFIX + stray: tensor}))
    refuse(case, adapter, tmp_path, stray, module_of(stray))


def is_needed(name, key):
    """Return whether an adapter without this tensor is incomplete."""
    if key.endswith("base_layer.weight"):  # the base has the same
        return CASES[name].vocabulary is not None
    if key.endswith(".bias") and ".lora_B." not in key:  # the configuration does not say which biases there are
        return name == "resized_phi"
    return True


def damages(name, key, tensor):
    """Yield what may stand in an adapter instead of one of its tensors, of which an error must name that tensor."""
    if is_needed(name, key):
        yield {}
    for dim in range(tensor.dim()):
        yield {key: tensor.narrow(dim, 1, tensor.shape[dim] - 1)}
    yield {key: tensor[None]}
    if tensor.dim() > 1:
        yield {key: tensor.reshape(-1)}
    yield {key: torch.full_like(tensor, float("nan"))}
    yield {key: tensor.to(torch.int32)}
    yield {key: tensor, key.removeprefix(PREFIX): tensor * 2}
    yield {key: tensor, f"module.{key}": tensor * 2}


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_misshapen_invalid_or_repeated_tensor_is_named_in_the_error(changed, tmp_path, name):
    case, adapter = changed(name)
    whole = load_file(adapter / WEIGHTS)
    for key in one_of_each_kind(adapter):
        for instead in damages(name, key, whole[key]) if not key.endswith(COPIES) else ():
            others = {other: tensor for other, tensor in whole.items() if other != key}
            save_file({k: t.contiguous() for k, t in (others | instead).items()}, adapter / WEIGHTS, {"format": "pt"})
            refuse(case, adapter, tmp_path, *names_of(key))


@pytest.mark.parametrize("name", ["resized_saved", "resized_saved_embedding_tied", "everything_phi"])
def test_copies_that_differ_are_named_in_the_error(changed, tmp_path, name):
    """peft writes a replaced tensor twice; which copy was trained cannot be known."""
    case, adapter = changed(name)
    copies = [key for key in keys_of(adapter) if ".modules_to_save." in key]
    assert copies
    for key in copies:
        with kept(adapter):
            change_tensors(adapter, lambda t, key=key: t[key].mul_(1.5))
            refuse(case, adapter, tmp_path, module_of(key))


# Configuration and tensors must agree


@pytest.mark.parametrize("name", KINDS)
def test_a_rank_that_differs_from_the_tensors_is_refused(changed, tmp_path, name):
    """Also for experts, whose tensors would fit twice the rank and half as many experts."""
    case, adapter = changed(name)
    modules = {name for key in keys_of(adapter) if "lora_" in key for name in names_of(key)}
    for rank in (2, 8):
        change_config(adapter, r=rank)
        refuse(case, adapter, tmp_path, *modules)


@pytest.mark.parametrize(
    ("name", "alpha"),
    [
        *(("dora", "0"), ("embedding", "-1"), ("lora_bias", "null"), ("experts_mixtral", '"8"'), ("router", "true")),
        *(("experts_one_by_one_qwen3", "[8]"), ("dora", "NaN"), ("experts_mixtral", "-Infinity"), ("router", "1e999")),
    ],
)
def test_a_scaling_that_is_not_a_positive_number_is_refused(changed, tmp_path, name, alpha):
    case, adapter = changed(name)
    text = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text(re.sub(r'"lora_alpha": \d+', f'"lora_alpha": {alpha}', text))
    assert f'"lora_alpha": {alpha}' in (adapter / CONFIG).read_text()
    refuse(case, adapter, tmp_path, "lora_alpha", CONFIG)


@pytest.mark.parametrize(
    ("name", "says", "names"),
    [
        ("linear", {"use_dora": True}, ("magnitude", Q)),
        ("dora", {"use_dora": False}, (".mlp.down_proj has a lora_magnitude_vector, but use_dora is not set",)),
        ("lora_bias", {"lora_bias": False}, ("has a lora_B.bias, but lora_bias is not set",)),
        ("linear", {"lora_bias": True}, ("bias",)),
        ("tokens", {"trainable_token_indices": None}, ("embed_tokens",)),
        ("tokens", {"trainable_token_indices": [7, 2, 2]}, ("embed_tokens",)),
        ("tokens", {"trainable_token_indices": [7, 2, -1]}, ("embed_tokens",)),
        ("tokens", {"trainable_token_indices": {"lm_head": [7, 2, 40]}}, ("embed_tokens",)),
        ("tokens", {"trainable_token_indices": {"embed_tokens": [7, 2, 40], "lm_head": [1]}}, ("lm_head",)),
        ("linear", {"trainable_token_indices": [7]}, ("trainable_token_indices",)),
        ("tokens_resized", {"trainable_token_indices": [303, 5, 310]}, ("embed_tokens",)),
        ("experts_mixtral", {"target_parameters": None}, ("experts",)),
        ("experts_up_only", {"target_parameters": ["experts.down_proj"]}, ("experts",)),
        ("saved_head", {"modules_to_save": ["lm_head", "norm"]}, ("norm",)),
        ("linear", {"target_parameters": ["experts.down_proj"]}, ("target_parameters", "experts")),
        ("linear", {"bias": "lora"}, ("bias",)),
        ("dora", {"rank_pattern": {"q_proj": 3}}, (Q,)),
        ("experts_patterns", {"rank_pattern": {}}, ("gate_up_proj", "experts")),
        ("experts_patterns", {"alpha_pattern": {"gate_up_proj": 0}}, ("lora_alpha",)),
    ],
)
def test_a_configuration_that_does_not_match_the_tensors_is_refused(changed, tmp_path, name, says, names):
    case, adapter = changed(name)
    change_config(adapter, **says)
    refuse(case, adapter, tmp_path, *names)


def test_an_inner_or_outer_lora_of_experts_that_is_missing_is_noticed(changed, tmp_path):
    """Without the inner one, the outer one has the names of a single one."""
    case, adapter = changed("experts_mixtral")
    for half in ("inner", "outer"):
        with kept(adapter):
            words = f"{EXPERTS}.base_layer.lora_" if half == "inner" else f"{EXPERTS}.lora_"
            change_tensors(adapter, lambda t, words=words: [t.pop(PREFIX + f"{words}{x}.weight") for x in "AB"])
            refuse(case, adapter, tmp_path, "experts")


def test_biases_that_the_base_does_not_have_are_named_in_the_error(made, tmp_path):
    """peft computes with them; no checkpoint of this architecture can hold them."""
    case = peft_adapters.make(made, "linear_orthogonal")
    lora = {"target_modules": ["q_proj"], "lora_bias": True}
    adapter = peft_adapters.write_adapter(tmp_path / "adapter", peft_adapters.Case(tied=True, lora=lora), case.base)
    refuse(case, adapter, tmp_path, f"{Q}.bias", Q.replace("layers.0", "layers.1"))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_half_a_resized_vocabulary_is_refused(made, tmp_path, target):
    """peft saves the table that has a LoRA, but not the other one, which was resized too."""
    case = peft_adapters.make(made, "head")
    wanted = peft_adapters.Case(lora={"target_modules": [target]}, vocabulary=peft_adapters.GREATER_VOCABULARY)
    adapter = peft_adapters.write_adapter(tmp_path / "adapter", wanted, case.base)
    refuse(case, adapter, tmp_path, "embed_tokens", "lm_head", "embedding", "head")


# Unsupported features


def test_dora_with_lora_bias_is_refused(changed, tmp_path):
    """peft does not write it and defines no formula for it."""
    case, adapter = changed("lora_bias")
    change_config(adapter, use_dora=True)
    with edited_tensors(adapter / WEIGHTS) as tensors:
        for key in [key for key in tensors if "lora_B.weight" in key]:
            tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(tensors[key].shape[0])
    refuse(case, adapter, tmp_path, "lora_bias", "bias")


# Wrong base


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("linear", "conv1d"),
        ("experts_mixtral", "linear"),
        ("experts_mixtral", "experts_qwen3"),
        ("biases_all", "linear"),
        ("tokens_conv1d", "linear"),
        ("resized_conv1d", "linear"),
        ("experts_one_by_one_mixtral", "experts_qwen2"),
        ("experts_transposed", "experts_mixtral"),
    ],
)
def test_an_adapter_for_a_different_model_is_refused(made, tmp_path, name, other):
    adapter, base = peft_adapters.make(made, name).adapter, peft_adapters.make(made, other).base
    with pytest.raises((BaseMismatchError, UsageError)) as caught:
        merge(base, [adapter], tmp_path / "out")
    assert any(name in caught.value.message for key in keys_of(adapter) for name in names_of(key))
    assert caught.value.hint
    assert list(tmp_path.glob("out*")) == []


# The same on the command line


@pytest.mark.parametrize(
    "name",
    ["dora_rslora", "biases_all_conv1d", "saved_norms", "saved_tied_ensured", "resized_saved_embedding_tied",
     "embeddings_saved_tied", "tokens_both", "tokens_resized_tied", "experts_qwen3", "everything"],
)  # fmt: skip
def test_the_number_of_trained_parameters_is_that_of_peft(name, made):
    case = peft_adapters.make(made, name)
    with peft_adapters.quiet():
        base = peft_adapters.load_float32(case.base, case.case.vocabulary)
        theirs = peft.PeftModel.from_pretrained(base, case.adapter, is_trainable=True)
    assert read_adapter(case.adapter).trained_parameters == theirs.get_nb_trainable_parameters()[0]
