"""Verdicts on adapters are compared with what peft does, and with written-out rules of the other programs."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import peft
import peft_adapters
import pytest
import tiny
import torch
from folders import edit_json, edited_tensors
from safetensors.torch import load_file, save_file
from verdicts import taken, verdicts, words

from adaptkit import discovery
from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.errors import AdapterError, AdaptkitError, BaseMismatchError, CheckpointError, UsageError
from adaptkit.operations import targets
from adaptkit.operations.check import check
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import quantize
from adaptkit.operations.resize import ResizeOptions, resize
from adaptkit.operations.targets import _peft_selection
from adaptkit.operations.targets._target import Target

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UP = "base_model.model.model.layers.0.mlp.up_proj"
PLAIN_NAME = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return tiny.write_llama(tmp_path_factory.mktemp("check") / "untied", tied=False)


@pytest.fixture
def make(tmp_path, untied):
    def made(base=untied, name="adapter", **lora_config):
        with peft_adapters.quiet():
            return tiny.write_peft_adapter(tmp_path / name, base, **{"target_modules": LINEARS} | lora_config)

    return made


def configure(folder, **values):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "remove"}))


def rewrite(folder, change):
    tensors = load_file(folder / PLAIN_NAME)
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, folder / PLAIN_NAME, metadata={"format": "pt"})


def with_peft(folder, base, vocabulary=None):
    from peft import PeftModel

    with peft_adapters.quiet():
        return PeftModel.from_pretrained(peft_adapters.load_float32(base, vocabulary), folder)


def peft_takes(folder, base, vocabulary=None):
    """Whether peft loads every tensor of the file, and adds no LoRA that the file does not have."""
    from peft import get_peft_model_state_dict

    try:
        model = with_peft(folder, base, vocabulary)
        with peft_adapters.quiet():
            adapter = get_peft_model_state_dict(model)
    except (
        LookupError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, ImportError, re.error
    ):  # fmt: skip
        return False
    arrived, file = model.state_dict() | adapter, load_file(folder / PLAIN_NAME)
    copies = (".original_module.", ".modules_to_save.")  # peft writes these twice
    names = [name for name in file if not any(copy in name for copy in copies)]
    trained = {name for name in adapter if "lora_" in name}
    plain = {name.replace(".default", "").replace("_vector.weight", "_vector") for name in file}
    return all(name in arrived and torch.equal(arrived[name], file[name]) for name in names) and trained <= plain


def scalings(folder, base):
    """Map modules to the factor by which peft multiplies B A, and to the rank of A."""
    return {
        name: (layer.scaling["default"], layer.lora_A["default"].weight.shape[0])
        for name, layer in with_peft(folder, base).named_modules()
        if hasattr(layer, "lora_A")
    }


GOOD = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head and norms": {"modules_to_save": ["lm_head", "norm", "input_layernorm"]},
    "lora bias": {"lora_bias": True},
    "rank pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha pattern": {"alpha_pattern": {"layers.0.mlp.up_proj": 3}},
    "trained tokens": {"trainable_token_indices": [1, 5]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "q_proj", "v_proj"]},
    "regular expression": {"target_modules": r".*layers\.\d+\..*_proj"},
}


KINDS = [
    "linear", "linear_patterns", "linear_as_parameter", "conv1d", "conv1d_with_head", "embedding",
    "embedding_tied_ensured", "head_tied", "dora_embedding", "lora_bias", "biases_all_lora_bias", "saved_mlp",
    "saved_both_tied", "tokens_both", "experts_patterns", "experts_up_only", "experts_weight", "experts_saved",
    "router", "everything", "everything_phi",
]  # fmt: skip
"""Cases as peft writes them: every kind of tensor, and names that the base's files do not have."""


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_peft_wrote_load_and_get_at_most_warnings(kind, made):
    case = peft_adapters.make(made, kind)
    assert peft_takes(case.adapter, case.base)
    for base in (None, case.base):
        found = verdicts(case.adapter, base)["peft"]
        assert {finding.level for finding in found.findings} <= {"warning"}
        assert "target_parameters" not in words(found)


@pytest.mark.parametrize("kind", ["resized", "resized_embedding", "resized_tied", "resized_head_tied"])
def test_an_adapter_of_a_resized_vocabulary_needs_a_resized_base(kind, made):
    case = peft_adapters.make(made, kind)
    entries = case.case.vocabulary
    assert not peft_takes(case.adapter, case.base)
    assert peft_takes(case.adapter, case.base, entries)
    found = verdicts(case.adapter, case.base)
    assert f"resize_token_embeddings({entries})" in words(found["peft"])
    assert {name for name, verdict in found.items() if verdict.taken} == {"peft"}
    assert "resize_token" not in words(verdicts(case.adapter)["peft"])


@pytest.mark.parametrize(
    ("kind", "loads"),
    [
        ("experts_one_by_one_mixtral_fused", True),
        ("experts_one_by_one_qwen3", True),
        ("experts_one_by_one_rslora", False),
        ("experts_one_by_one_qwen2", False),
    ],
)
def test_adapters_of_single_experts_are_judged_as_each_program_loads_them(kind, loads, made):
    """``loads``, from the fixture, is whether peft loads all of it."""
    case = peft_adapters.make(made, kind)
    assert case.case.loads == loads
    found = verdicts(case.adapter, case.base)
    assert found["peft"].taken == loads
    assert found["vllm"].taken
    assert "--lora-target-modules all" in words(found["sglang"])


@pytest.mark.parametrize(
    "kind", ["AdaLoRA", "IA3", "VeRA", "LoHa", "a prompt", "trainable tokens alone", "KaSA", "aLoRA"]
)
def test_other_adapter_types_and_lora_variants_get_a_verdict(kind, llama, tmp_path):
    folder = peft_adapters.write_refused(tmp_path / "adapter", kind, llama)
    found = verdicts(folder, llama)
    assert found["peft"].taken
    assert not found["vllm"].taken
    assert not found["sglang"].taken
    assert found["gguf"].taken == (kind == "aLoRA")
    assert not any("adaptkit merge" in words(verdict) for verdict in found.values())  # it would refuse them


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_only_peft_accepts_lora_of_convolutions(dims, tmp_path):
    layer = getattr(torch.nn, f"Conv{dims}d")(8, 6, 3)
    model = peft.get_peft_model(torch.nn.ModuleDict({"conv": layer}), peft.LoraConfig(target_modules=["conv"], r=4))
    model.save_pretrained(tmp_path / "adapter")
    found = verdicts(tmp_path / "adapter", None)
    assert found["peft"].taken
    for program in ("vllm", "sglang", "gguf"):
        assert not found[program].taken
        assert "LoRA of convolutions: conv" in words(found[program])


def test_only_peft_accepts_lora_of_multihead_attention(tmp_path):
    """peft gives it two pairs, with names of their own."""
    base = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(16, 2), "fc": torch.nn.Linear(16, 16)})
    before = {name: value.clone() for name, value in base.state_dict().items()}
    config = peft.LoraConfig(target_modules=["attention", "fc"], r=4, init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    fresh = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(16, 2), "fc": torch.nn.Linear(16, 16)})
    fresh.load_state_dict(before)
    merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()
    assert sum(not torch.equal(merged[name], value) for name, value in before.items()) == 3  # peft loads all of it
    found = verdicts(tmp_path / "adapter", None)
    assert found["peft"].taken
    for program in ("vllm", "sglang", "gguf"):
        assert "LoRA of torch.nn.MultiheadAttention: attention.base_layer.out_proj" in words(found[program])
    with pytest.raises(AdapterError, match=r"attention is a torch\.nn\.MultiheadAttention, of which LoRA is not"):
        read_adapter(tmp_path / "adapter")


def within(wrapper, tensors):
    """Rename tensors as if the model was inside a wrapper."""
    return {name.replace("base_model.model.", f"base_model.model.{wrapper}."): v for name, v in tensors.items()}


BROKEN = {
    "no prefix": lambda t: {name.removeprefix("base_model.model."): tensor for name, tensor in t.items()},
    "another prefix": lambda t: {name.replace("base_model.model.", "base_model."): v for name, v in t.items()},
    "another adapter's name": lambda t: {name.replace("lora_A.", "lora_A.other."): v for name, v in t.items()},
    "a compiled model": lambda t: within("_orig_mod", t),
    "data parallelism": lambda t: within("module", t),
    "a doubled prefix": lambda t: within("base_model.model", t),
    "a layer more": lambda t: t | {
        f"base_model.model.model.layers.2.mlp.up_proj.lora_{half}.weight": torch.ones(shape)
        for half, shape in (("A", (4, 64)), ("B", (128, 4)))
    },
    "a stray tensor": lambda t: t | {"base_model.model.foo.weight": torch.ones(3)},
    "a stray bias": lambda t: t | {f"{UP}.base_layer.bias": torch.ones(128)},
    "a whole tensor of a module with a LoRA": lambda t: t | {f"{UP}.weight": torch.ones(128, 64)},
    "the base of a module without a LoRA": lambda t: t | {
        "base_model.model.model.norm.base_layer.weight": torch.ones(64)
    },
    "a whole tensor of another shape": lambda t: t | {"base_model.model.model.norm.weight": torch.ones(7)},
    "one key more": lambda t: t | {f"{UP}.lora_C.weight": torch.ones(3)},
    "one module more": lambda t: t | {
        f"{UP}2.lora_A.weight": torch.ones(4, 64),
        f"{UP}2.lora_B.weight": torch.ones(8, 4),
    },
    "half of a pair": lambda t: {name: tensor for name, tensor in t.items() if name != f"{UP}.lora_B.weight"},
    "magnitudes unasked": lambda t: t | {f"{UP}.lora_magnitude_vector": torch.ones(128)},
    "a bias of B unasked": lambda t: t | {f"{UP}.lora_B.bias": torch.ones(128)},
    "rows unasked": lambda t: t | {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 64)
    },
    "another rank": lambda t: t | {f"{UP}.lora_A.weight": torch.ones(2, 64), f"{UP}.lora_B.weight": torch.ones(128, 2)},
    "no matrix": lambda t: t | {f"{UP}.lora_A.weight": torch.ones(64)},
}  # fmt: skip
MISCONFIGURED = {
    "another r": {"r": 8},
    "r of zero": {"r": 0},
    "r that is not an integer": {"r": 4.0},
    "an alpha pattern with a text": {"alpha_pattern": {"up_proj": "3"}},
    "an excluded layer": {"layers_to_transform": [0]},
    "one layer by its number": {"layers_to_transform": 1},
    "layers with a different name": {"layers_to_transform": [0, 1], "layers_pattern": "h"},
    "layers beside a pattern of modules": {"target_modules": ".*_proj", "layers_to_transform": [0, 1]},
    "a name of layers without numbers": {"layers_pattern": "layers"},
    "a module within a saved one": {"modules_to_save": ["mlp"]},
    "an exclusion that is not a pattern": {"exclude_modules": "("},
    "a saved module that is not a pattern": {"modules_to_save": ["("]},
    "an unknown bias": {"bias": "weird"},
    "no bias": {"bias": None},
    "an unknown task type": {"task_type": "NOPE"},
    "an unknown initialization": {"init_lora_weights": "nonsense"},
    "an initialization that needs statistics": {"init_lora_weights": "corda"},
    "an initialization that needs a configuration": {"init_lora_weights": "loftq"},
    "a dropout above one": {"lora_dropout": 2},
    "a dropout that is a text": {"lora_dropout": "0.1"},
    "dora and lora_bias": {"use_dora": True, "lora_bias": True},
    "a name instead of a list": {"target_parameters": "up_proj.weight"},
    "a module, and its weight": {"target_parameters": ["up_proj.weight"]},
    "a number instead of names": {"target_parameters": 3},
    "a flag instead of names": {"target_parameters": True},
    "a list in a list of names": {"target_parameters": [["up_proj.weight"]]},
    "a number among names": {"target_parameters": ["nothing.weight", 1]},
    "a vector among the matrices": {"target_parameters": ["norm.weight"]},
    "vectors among the matrices": {"target_parameters": ["weight"], "target_modules": []},
    "no modules": {"target_modules": None},
    "alpha that is a text": {"lora_alpha": "16"},
    "an untargeted module": {"target_modules": ["q_proj"]},
    "an excluded module": {"exclude_modules": ["up_proj"]},
    "a pattern of another rank": {"rank_pattern": {"up_proj": 2}},
    "a saved module that is not there": {"modules_to_save": ["lm_head"]},
    "dora without magnitudes": {"use_dora": True},
    "lora_bias without biases": {"lora_bias": True},
    "patterns that are null": {"rank_pattern": None},
    "alpha patterns that are null": {"alpha_pattern": None},
    "tokens that are not there": {"trainable_token_indices": [1, 2]},
    "an unknown peft type": {"peft_type": "FUTURE"},
    "no type": {"peft_type": "remove"},
}


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"exclude_modules": ["1.up"]},
        {"modules_to_save": ["model.2"]},
        {"layers_to_transform": [0]},
        {"target_parameters": ["down.weight"]},
    ],
)
def test_modules_targeted_by_full_path_are_not_compared_with_each_other(others, monkeypatch):
    """There may be tens of thousands of them."""
    modules = [f"model.{layer}.{name}" for layer in range(4) for name in ("up", "down", "gate")]
    named = [module for module in modules if "gate" not in module]
    config = {"target_modules": [*named, "0.gate", 5]} | others
    expected = [module for module in modules if not _peft_selection.is_target(config, module)]
    assert _peft_selection.untargeted(config, modules) == expected
    assert "model.1.gate" in expected
    assert ("model.1.up" in expected) == ("exclude_modules" in others)
    compared, matches = [], _peft_selection._matches
    monkeypatch.setattr(_peft_selection, "_matches", lambda names, path: compared.append(names) or matches(names, path))
    _peft_selection.untargeted(config, named)
    assert max(len(names or ()) for names in compared) == 1


@pytest.mark.parametrize("case", [*BROKEN, *MISCONFIGURED])
def test_adapters_that_peft_refuses_or_loads_only_in_part_are_rejected(case, make, untied):
    folder = make()
    if case in BROKEN:
        rewrite(folder, BROKEN[case])
    else:
        configure(folder, **MISCONFIGURED[case])
    assert not peft_takes(folder, untied)
    assert not verdicts(folder, untied)["peft"].taken


LOADED = {
    "alpha of zero": {"lora_alpha": 0},
    "alpha below zero": {"alpha_pattern": {"up_proj": -3}},
    "all layers": {"layers_to_transform": [0, 1]},
    "no layers": {"layers_to_transform": []},
    "an exclusion by the ends of names": {"exclude_modules": ["("]},
    "all layers by their name": {"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
    "a bias of its own kind": {"bias": "lora_only"},
    "another task": {"task_type": "SEQ_2_SEQ_LM"},
    "beginnings in capitals": {"init_lora_weights": "GAUSSIAN"},
    "no beginnings": {"init_lora_weights": None},
    "a dropout below zero": {"lora_dropout": -1},
    "a saved module that no model has": {"modules_to_save": ["score"]},
    "no names of parameters": {"target_parameters": {}},
    "a name of no parameter": {"target_parameters": ["experts.nothing"]},
    "numbers for names": {"target_parameters": [1]},
}


@pytest.mark.parametrize("case", LOADED)
def test_unusual_configurations_that_peft_loads_are_accepted(case, make, untied):
    folder = make()
    configure(folder, **LOADED[case])
    assert peft_takes(folder, untied)
    assert verdicts(folder, untied)["peft"].taken


def test_a_name_in_target_parameters_that_no_tensor_is_for_gets_a_warning(make, untied):
    folder = make()
    configure(folder, target_parameters=["experts.nothing", "nothing"])
    for base in (None, untied):
        assert levels(verdicts(folder, base)["peft"], "experts.nothing and 1 more, but the file has no") == {"warning"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(peft_adapters.load_float32(untied), folder)
    assert any("no parameter was matched" in str(warning.message) for warning in caught)


def test_patterns_of_a_weight_in_target_parameters_are_those_of_the_parameter(make, untied):
    patterns = {"rank_pattern": {"up_proj.weight": 2}, "alpha_pattern": {"up_proj.weight": 6, "up_proj": 40}}
    folder = make(target_modules=[], target_parameters=["up_proj.weight"], **patterns)
    assert set(scalings(folder, untied).values()) == {(3, 2)}
    found = verdicts(folder, untied)
    assert found["peft"].findings == ()
    assert "scales model.layers.0.mlp.up_proj and 1 more by 3" in words(found["sglang"])


def test_an_alpha_of_zero_or_below_is_a_warning_that_says_its_effect(make, untied):
    folder = make()
    configure(folder, lora_alpha=0)
    assert {scaling for scaling, _ in scalings(folder, untied).values()} == {0}
    assert levels(verdicts(folder)["peft"], "changes nothing") == {"warning"}
    assert "fails" not in words(verdicts(folder)["peft"])
    configure(folder, lora_alpha=8, alpha_pattern={"up_proj": -2})
    assert levels(verdicts(folder)["peft"], "subtracts") == {"warning"}


NAMED = {
    "A and B": ({}, {"lora_A.": "lora_A.default.", "lora_B.": "lora_B.default."}),
    "A alone": ({}, {"lora_A.": "lora_A.default."}),
    "magnitudes": ({"use_dora": True}, {"magnitude_vector": "magnitude_vector.default.weight"}),
    "older magnitudes": ({"use_dora": True}, {"magnitude_vector": "magnitude_vector.default"}),
    "biases": ({"lora_bias": True}, {"lora_B.bias": "lora_B.default.bias"}),
    "an embedding": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        {f"lora_embedding_{half}": f"lora_embedding_{half}.default" for half in "AB"},
    ),
    "rows": ({"trainable_token_indices": [1, 5]}, {"tokens_delta": "tokens_delta.default"}),
    "a head": ({"modules_to_save": ["lm_head"]}, {"lm_head.": "lm_head.modules_to_save.default."}),
    "a head without the name": ({"modules_to_save": ["lm_head"]}, {"lm_head.": "lm_head.modules_to_save."}),
}


@pytest.mark.parametrize("case", NAMED)
def test_tensor_names_with_the_adapters_name_are_accepted_where_peft_loads_them(case, make, untied):
    lora_config, names = NAMED[case]
    folder = make(**lora_config)

    def renamed(name):
        for old, new in names.items():
            name = name.replace(old, new)
        return name

    rewrite(folder, lambda t: {renamed(name): tensor for name, tensor in t.items()})
    loads = peft_takes(folder, untied)
    assert loads == (case in ("A and B", "A alone", "magnitudes", "biases", "an embedding"))
    for base in (None, untied):
        assert verdicts(folder, base)["peft"].taken == loads


@pytest.mark.parametrize("module", ["lm_head", "model.norm", "model.layers.1.input_layernorm"])
def test_every_module_that_modules_to_save_matches_must_be_in_the_file(module, make, untied):
    folder = make(modules_to_save=["lm_head", "norm"])
    assert verdicts(folder, untied)["peft"].taken
    rewrite(folder, lambda t: {name: v for name, v in t.items() if name != f"base_model.model.{module}.weight"})
    assert not peft_takes(folder, untied)
    assert levels(verdicts(folder, untied)["peft"], f"{module}.weight: not in the file") == {"error"}


@pytest.mark.parametrize(
    ("index", "loads", "runs"),
    [(300, True, True), (-1, True, False), (-301, True, False), (301, False, False), (-302, False, False)],
)
def test_trained_token_indices_must_be_valid_for_loading_and_for_running(index, loads, runs, make, untied):
    """peft loads negative indices, but then fails when the model runs."""
    folder = make(trainable_token_indices=[1, 5])
    configure(folder, trainable_token_indices=[1, index])
    assert peft_takes(folder, untied) == loads
    if loads:
        with contextlib.nullcontext() if runs else pytest.raises(IndexError):
            with_peft(folder, untied)(torch.tensor([[1, 2]]))
    assert verdicts(folder, untied)["peft"].taken == runs


@pytest.mark.parametrize("case", ["a compiled model", "data parallelism", "a doubled prefix"])
def test_name_prefixes_left_by_wrappers_are_rejected_with_and_without_the_base(case, make, untied):
    folder = make()
    rewrite(folder, BROKEN[case])
    for base in (None, untied):
        assert not {"peft", "vllm"} & taken(folder, base)


def test_adapter_names_need_the_models_prefix_even_if_the_bases_files_lack_it(tmp_path, gpt2):
    """The Hub's GPT-2 has ``h.0.…``, which transformers names ``transformer.h.0.…``."""
    folder, bare = tiny.write_peft_adapter(tmp_path / "of-gpt2", gpt2), shutil.copytree(gpt2, tmp_path / "bare")
    tensors = load_file(gpt2 / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    assert peft_takes(folder, bare)
    assert verdicts(folder, bare)["peft"].taken
    rewrite(folder, lambda t: {name.replace("model.transformer.", "model."): v for name, v in t.items()})
    assert not peft_takes(folder, bare)
    assert not verdicts(folder, bare)["peft"].taken


def lost_in(model, folder):
    """Return the tensors of an adapter that peft does not load into a model; None if it fails."""
    from peft import PeftModel

    try:
        arrived = PeftModel.from_pretrained(model, folder).state_dict()
    except (AttributeError, ValueError, KeyError):
        return None
    same = {tensor.shape: [t for t in arrived.values() if t.shape == tensor.shape] for tensor in arrived.values()}
    file = load_file(folder / PLAIN_NAME)
    return [
        name for name, tensor in file.items() if not any(torch.equal(tensor, t) for t in same.get(tensor.shape, []))
    ]


@pytest.mark.parametrize("name", tiny.OTHER_CLASSES)
@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("inner", ["", "model.", "bert."])
def test_the_verdict_is_for_the_model_class_that_base_and_task_imply(name, task, inner, tmp_path):
    """Adapters of ``AutoModel`` and of a classifier differ only in their tensors' names."""
    import transformers

    base = tiny.write_class(tmp_path / "base", name)
    layer = "layers.0.mlp.up_proj" if name.startswith("Llama") else "encoder.layer.0.intermediate.dense"
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": task, "r": 2, "lora_alpha": 2, "target_modules": [layer]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    halves = {"A": torch.ones(2, 64), "B": torch.ones(128, 2)}
    save_file(
        {f"base_model.model.{inner}{layer}.lora_{half}.weight": tensor for half, tensor in halves.items()},
        folder / PLAIN_NAME,
    )
    loader = transformers.AutoModel if task == "FEATURE_EXTRACTION" else getattr(transformers, name)
    with peft_adapters.quiet():
        takes = lost_in(loader.from_pretrained(base), folder) == []
    assert verdicts(folder, base)["peft"].taken == takes


@pytest.mark.parametrize("has_head", [True, False])
def test_a_classifiers_adapter_must_contain_the_classification_head(has_head, tmp_path, untied):
    """peft adds the head to modules_to_save by itself, and a base that is a language model does not have one."""
    import transformers
    from peft import LoraConfig, get_peft_model

    def model():
        return transformers.AutoModelForSequenceClassification.from_pretrained(untied, num_labels=2)

    folder = tmp_path / "adapter"
    with peft_adapters.quiet():
        get_peft_model(model(), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])).save_pretrained(folder)
    if not has_head:
        rewrite(folder, lambda t: {name: tensor for name, tensor in t.items() if "score" not in name})
    with peft_adapters.quiet():
        takes = lost_in(model(), folder) == []
    assert takes == has_head
    assert verdicts(folder, untied)["peft"].taken == has_head


@pytest.mark.parametrize("rows", [[1, 5, 7], {"embed_tokens": [1]}])
def test_the_number_of_trained_tokens_must_match_the_rows_in_the_file(rows, make, untied):
    folder = make(trainable_token_indices=[1, 5])
    configure(folder, trainable_token_indices=rows)
    assert not peft_takes(folder, untied)
    assert not verdicts(folder)["peft"].taken


def test_an_error_names_the_tensor_and_suggests_a_change(make):
    folder = make()
    rewrite(folder, BROKEN["one key more"])
    for name, verdict in verdicts(folder).items():
        assert not verdict.taken, name
        error = next(finding for finding in verdict.findings if "lora_C" in finding.found)
        assert error.found == f"{UP}.lora_C.weight"
        assert error.change


@pytest.mark.parametrize("case", ["one key more", "half of a pair", "another rank", "no matrix"])
def test_no_program_accepts_tensors_that_do_not_fit_together(case, make):
    folder = make()
    rewrite(folder, BROKEN[case])
    assert taken(folder) == set()


# The programs that refuse each of peft's own adapters. They cannot be run here, so their rules are written out; their
# formulas for scaling are compared with what peft computes.
REFUSED = {
    "plain": set(),
    "rslora": {"sglang", "gguf"},
    "dora": {"vllm", "sglang", "gguf"},
    "head and norms": {"vllm", "sglang", "gguf"},
    "lora bias": {"vllm", "sglang", "gguf"},
    "rank pattern": {"sglang"},
    "alpha pattern": {"sglang", "gguf"},
    "trained tokens": {"vllm", "sglang", "gguf"},
    "embedding": set(),
    "regular expression": {"sglang"},
}


@pytest.mark.parametrize("case", GOOD)
def test_the_expected_programs_refuse_each_kind_of_adapter(case, make):
    found = verdicts(make(**GOOD[case]))
    assert {name for name, verdict in found.items() if not verdict.taken} == REFUSED[case]


@pytest.mark.parametrize("case", ["plain", "rslora", "rank pattern", "alpha pattern"])
def test_programs_that_scale_differently_from_peft_are_reported(case, make, untied):
    folder = make(**GOOD[case])
    config = json.loads((folder / "adapter_config.json").read_text())
    meant = scalings(folder, untied)
    flat = all(scaling == config["lora_alpha"] / config["r"] for scaling, _ in meant.values())
    by_rank = all(scaling == config["lora_alpha"] / rank for scaling, rank in meant.values())
    found = verdicts(folder)
    assert ("adapter_config.json scales" in words(found["sglang"])) == (not flat)
    assert ("adapter_config.json scales" in words(found["gguf"])) == (not by_rank)
    by_root = all(s == pytest.approx(config["lora_alpha"] / config["r"] ** 0.5) for s, _ in meant.values())
    old_vllm = by_root if config["use_rslora"] else flat
    assert ("older versions silently scale by" in words(found["vllm"])) == (not old_vllm)
    assert found["vllm"].taken


def test_the_suggested_resize_turns_rslora_into_plain_lora(make, tmp_path, untied):
    """After resizing to the adapter's own rank, all programs accept it, and its scaling is the same."""
    folder = make(use_rslora=True)
    assert f"run adaptkit resize {folder} -o OUT --rank 4," in words(verdicts(folder)["sglang"])
    resize(folder, tmp_path / "plain", ResizeOptions(rank=4))
    assert taken(tmp_path / "plain", untied) == {"gguf", "peft", "sglang", "vllm"}
    assert scalings(tmp_path / "plain", untied) == scalings(folder, untied)


def test_a_merge_is_suggested_where_resizing_does_not_help(make):
    for folder in (make(name="a", alpha_pattern={"q_proj": 3}), make(name="b", use_rslora=True, use_dora=True)):
        assert f"adaptkit merge BASE {folder}" in words(verdicts(folder)["gguf"])
        assert "resize" not in words(verdicts(folder)["gguf"])


@pytest.mark.parametrize(
    "change",
    [{"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
)
def test_the_suggested_merge_command_works_on_a_base_with_a_tied_head(change, make, llama, untied, run_cli, tmp_path):
    """It needs ``--untie``, which once only the verdict on llama.cpp had; other heads have no use for it."""
    folder = make(llama, **change)
    changes = {f.change for v in verdicts(folder, llama).values() for f in v.findings if "adaptkit merge" in f.change}
    assert changes
    for text in changes:
        (words_of,) = re.findall(r"adaptkit (merge BASE .* -o MERGED[^,]*),", text)
        paths = {"BASE": llama, "MERGED": tmp_path / "merged"}
        assert run_cli(*(paths.get(word, word) for word in words_of.split()), "--force").code == 0
    on_untied = [words(verdict) for verdict in verdicts(folder, untied).values()]
    assert any("adaptkit merge" in text for text in on_untied)
    assert not any("--untie" in text for text in on_untied)
    assert any("--untie" in words(verdict) for verdict in verdicts(folder, None).values())


@pytest.mark.parametrize(("rank", "flag"), [(16, None), (17, 32), (64, 64), (400, 512), (513, None)])
def test_vllm_accepts_ranks_up_to_512_and_needs_max_lora_rank_above_16(rank, flag, make):
    verdict = verdicts(make(rank=rank))["vllm"]
    assert verdict.taken == (rank <= 512)
    assert (f"--max-lora-rank {flag}," in words(verdict)) == (flag is not None)
    assert ("resize" in words(verdict)) == (rank > 16)


def test_vllm_limits_ranks_in_rank_pattern_that_match_no_module(make):
    folder = make(rank_pattern={"k_proj": 2})
    assert levels(verdicts(folder)["vllm"], "ranks up to") == set()
    for rank, level in ((64, "warning"), (1024, "error")):
        configure(folder, rank_pattern={"k_proj": 2, "nowhere": rank})
        assert levels(verdicts(folder)["vllm"], f"rank {rank}") == {level}


@pytest.mark.parametrize(
    ("config", "refusing"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, {"vllm", "sglang", "gguf"}),
        ({"init_lora_weights": "lora_ga"}, {"vllm", "sglang", "gguf"}),
        ({"init_lora_weights": "gaussian"}, set()),
        ({"alora_invocation_tokens": [3, 4]}, {"vllm", "sglang"}),
        ({"layer_replication": [[0, 2], [1, 2]]}, {"vllm", "sglang", "gguf"}),
        ({"arrow_config": {"top_k": 3}}, {"vllm", "sglang", "gguf"}),
        ({"bias": "all"}, {"vllm"}),
        ({"fan_in_fan_out": True}, set()),
        ({"use_dora": True}, {"vllm", "sglang", "gguf", "peft"}),
        ({"modules_to_save": ["lm_head"]}, {"vllm", "gguf", "peft"}),
        ({"modules_to_save": ["score"], "task_type": "SEQ_CLS"}, {"gguf"}),
        ({"lora_alpha": 0}, {"vllm", "sglang", "gguf"}),
        ({"target_modules": "remove"}, {"vllm", "sglang", "peft"}),
        ({"target_modules": "all-linear"}, set()),
        ({"peft_type": "IA3"}, {"vllm", "sglang", "gguf"}),
    ],
)
def test_configuration_keys_determine_which_programs_refuse(config, refusing, make):
    folder = make()
    configure(folder, **config)
    assert set(verdicts(folder)) - taken(folder) == refusing


def test_modules_of_rank_zero_have_to_be_made_again(make):
    """mergekit-extract-lora writes them; peft could not save such an adapter again."""
    folder = make(rank_pattern={"layers.1.self_attn.q_proj": 2})
    configure(folder, rank_pattern={"layers.1.self_attn.q_proj": 0})
    rewrite(
        folder,
        lambda tensors: {
            key: (tensor[:0] if "lora_A" in key else tensor[:, :0]) if "layers.1.self_attn.q_proj" in key else tensor
            for key, tensor in tensors.items()
        },
    )
    for name, verdict in verdicts(folder).items():
        changes = [finding.change for finding in verdict.findings if finding.level == "error"]
        assert any("rank of at least 1" in change for change in changes), name
        assert not any("save the adapter again with peft" in change for change in changes), name


def test_weights_that_no_program_reads_are_reported(make):
    folder = make()
    assert not any("which none of these programs reads" in text for text in check(folder).unknown)
    (folder / "non_lora_trainables.bin").write_bytes(b"")
    assert "the contents of non_lora_trainables.bin, which none of these programs reads" in check(folder).unknown


def test_an_unknown_init_lora_weights_is_reported_for_every_program(make):
    folder = make()
    configure(folder, init_lora_weights="milora")
    assert taken(folder) == set(verdicts(folder)) - {"peft", "vllm"}
    for verdict in verdicts(folder).values():
        assert "init_lora_weights is 'milora'" in words(verdict)


def test_initializations_that_change_the_base_are_errors_for_vllm(make):
    folder = make()
    for begun, phrase in (("olora", "vLLM rejects"), ("lora_ga", "vLLM ignores this"), ("milora", "vLLM rejects")):
        configure(folder, init_lora_weights=begun)
        assert levels(verdicts(folder)["vllm"], phrase) == {"error"}


def test_an_unknown_configuration_key_is_a_warning(make):
    folder = make()
    configure(folder, future_config={"x": 1})
    for verdict in verdicts(folder).values():
        assert verdict.taken
        assert "future_config" in words(verdict)


@pytest.mark.parametrize(
    ("modules", "level"),
    [
        (["q_proj", "v_proj"], None),
        (["gate_proj", "down_proj"], None),
        (["q_proj", "k_proj"], "error"),
        (["v_proj"], "error"),
        (["up_proj", "down_proj"], "warning"),
    ],
)
def test_sglang_needs_certain_projections_adapted_together(modules, level, make, untied):
    folder = make(target_modules=modules)
    found = [f.level for f in verdicts(folder)["sglang"].findings if "without" in f.found]
    assert found == ([level] if level else [])
    with_base = [f.level for f in verdicts(folder, untied)["sglang"].findings if "without" in f.found]
    assert with_base == (["error"] if level else [])


def test_only_peft_and_vllm_with_a_flag_accept_stacks_of_experts(made):
    both, one = (peft_adapters.make(made, kind) for kind in ("experts_patterns", "experts_up_only"))
    found = verdicts(both.adapter, both.base)
    assert {name for name, verdict in found.items() if verdict.taken} == {"peft", "vllm"}
    assert "--enable-mixed-moe-lora-format" in words(found["vllm"])
    assert taken(one.adapter, one.base) == {"peft"}


def test_stacks_of_experts_are_an_error_on_a_base_without_experts(made, untied):
    both = peft_adapters.make(made, "experts_patterns")
    assert not peft_takes(both.adapter, untied)
    assert levels(verdicts(both.adapter, untied)["peft"], "experts and 3 more: no tensor of this name in") == {"error"}


def levels(verdict, phrase):
    """Return the levels of the findings that contain a phrase."""
    return {f.level for f in verdict.findings if phrase in f.found + f.effect}


def test_sglang_sorts_tensors_by_name_and_supports_one_rank(make, untied, made, tmp_path, gpt2):
    folder = make()
    configure(folder, target_modules=[name for name in LINEARS if name != "o_proj"])
    assert levels(verdicts(folder)["sglang"], "does not name model.layers.0.self_attn.o_proj and 1 more") == {"error"}
    configure(folder, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
    assert verdicts(folder)["sglang"].findings == ()
    same_scaling = make(name="ranks", rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": 4})
    assert levels(verdicts(same_scaling)["sglang"], "scales") == set()
    assert levels(verdicts(same_scaling)["sglang"], "a rank other than") == {"error"}
    tables = make(name="tables", target_modules=["embed_tokens", "q_proj", "v_proj"])
    configure(tables, target_modules=["q_proj", "v_proj"])
    assert levels(verdicts(tables)["sglang"], "silently drops it") == {"error"}
    of_gpt2 = tiny.write_peft_adapter(tmp_path / "of-gpt2", gpt2)
    assert levels(verdicts(of_gpt2)["sglang"], "looks for layers.N.") == {"error"}
    single, stacks = (peft_adapters.make(made, f"experts_{kind}") for kind in ("one_by_one_qwen3", "qwen3"))
    assert levels(verdicts(single.adapter)["sglang"], "one pair of matrices") == {"warning"}
    assert levels(verdicts(stacks.adapter)["sglang"], "stack of experts") == {"error"}


def test_a_compensation_file_that_sglang_would_load_is_an_error(make, tmp_path):
    folder = make()
    shutil.copy(folder / PLAIN_NAME, folder / "adaptkit-compensation.safetensors")
    assert "sglang" not in taken(folder)
    assert "adaptkit-compensation.safetensors" in words(verdicts(folder)["sglang"])


def test_tokens_added_to_the_vocabulary_are_an_error_for_sglang(make, untied):
    folder = make()
    size = json.loads((untied / "config.json").read_text())["vocab_size"]
    (folder / "added_tokens.json").write_text(json.dumps({"<old>": size - 1}))
    assert [f.level for f in verdicts(folder)["sglang"].findings] == ["warning"]
    assert verdicts(folder, untied)["sglang"].findings == ()
    (folder / "added_tokens.json").write_text(json.dumps({"<old>": size - 1, "<new>": size}))
    assert "<new>" in words(verdicts(folder, untied)["sglang"])
    assert "sglang" not in taken(folder, untied)


@pytest.mark.parametrize("kind", ["text", "nested", "pipe", "folder"])
def test_an_unreadable_added_tokens_file_is_ignored(make, kind):
    folder = make()
    path = folder / "added_tokens.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("tokens" if kind == "text" else "[" * 100_000)
    assert verdicts(folder)["sglang"].findings == ()


def test_modules_and_shapes_are_compared_with_the_base(make, untied, tmp_path, gpt2):
    folder = make()
    assert taken(folder, untied) == {"gguf", "peft", "sglang", "vllm"}
    wide = tiny.write_llama(tmp_path / "wide", hidden=128)
    for other, phrase in ((wide, "down_proj is [128, 256]"), (gpt2, "no tensor of")):
        found = verdicts(folder, other)
        assert not any(verdict.taken for verdict in found.values())
        assert all(phrase in words(verdict) for verdict in found.values())
    assert verdicts(tiny.write_peft_adapter(tmp_path / "of-gpt2", gpt2), gpt2)["peft"].findings == ()


def test_missing_modules_are_only_a_warning_if_the_base_has_a_text_config(make, untied, copy_of):
    folder, base = make(), copy_of(untied)
    rewrite(folder, lambda t: {name.replace("model.layers", "decoder.layers"): tensor for name, tensor in t.items()})
    for inner, level in ((None, "error"), ({}, "warning")):
        config = json.loads((base / "config.json").read_text()) | {"text_config": inner}
        if inner is None:
            del config["text_config"]
        (base / "config.json").write_text(json.dumps(config))
        found = [f for f in verdicts(folder, base)["vllm"].findings if "no tensor of" in f.found]
        assert [finding.level for finding in found] == [level]


def test_gguf_warns_of_a_missing_base_name_and_rejects_norms(make, untied):
    folder = make(modules_to_save=["norm"])
    configure(folder, base_model_name_or_path=None)
    levels = {finding.found.split()[0]: finding.level for finding in verdicts(folder)["gguf"].findings}
    norms = "base_model.model.model.layers.0.input_layernorm.weight"
    assert levels == {"base_model_name_or_path": "warning", norms: "error"}
    assert "base_model_name_or_path" not in words(verdicts(folder, untied)["gguf"])


def test_vllm_accepts_classification_heads_and_limits_the_vocabulary_of_lm_head(make, untied, copy_of):
    classifier = make()
    rewrite(classifier, lambda t: t | {"base_model.model.score.weight": torch.ones(3, 64)})
    configure(classifier, modules_to_save=["score"], task_type="SEQ_CLS")
    assert levels(verdicts(classifier)["vllm"], "classification head") == {"warning"}
    assert taken(classifier) == {"peft", "vllm"}
    rewrite(classifier, lambda t: t | {"base_model.model.score.bias": torch.ones(3)})  # as in BERT; peft saves both
    assert "vllm" in taken(classifier)
    rewrite(classifier, lambda t: t | {"base_model.model.model.layers.0.mlp.up_proj.bias": torch.ones(3)})
    assert levels(verdicts(classifier)["vllm"], "up_proj.bias") == {"error"}
    head, base = make(name="head", target_modules=["lm_head", "q_proj", "v_proj"]), copy_of(untied)
    config = json.loads((base / "config.json").read_text())
    for size, level in ((258_048, set()), (258_049, {"error"})):
        (base / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
        assert levels(verdicts(head, base)["vllm"], "lm_head with a vocabulary") == level


@pytest.mark.parametrize("method", ["modelopt", "bitnet"])
def test_shapes_of_quantized_codes_are_not_compared_with_the_adapter(make, untied, copy_of, method):
    base = copy_of(untied)
    with edited_tensors(base / "model.safetensors") as tensors:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            rows, columns = tensors[name].shape
            codes = (rows, columns // 2) if method == "modelopt" else (rows // 4, columns)
            tensors[name], tensors[f"{name}_scale"] = torch.zeros(codes, dtype=torch.uint8), torch.ones(1)
    edit_json(base / "config.json", quantization_config={"quant_method": method})
    assert verdicts(make(), base, ["peft"])["peft"].taken


def test_a_quantized_base_is_compared_by_the_shapes_of_its_original_weights(make, untied, tmp_path):
    quantize(untied, tmp_path / "nf4")
    found = verdicts(make(), tmp_path / "nf4")
    assert {name for name, verdict in found.items() if verdict.taken} == {"peft", "sglang", "vllm"}
    assert "16-bit checkpoint" in words(found["gguf"])


def test_lora_of_a_tied_head_is_reported_for_llama_cpp_and_peft(make, llama, untied):
    folder = make(llama, target_modules=["lm_head", "q_proj", "v_proj"])
    assert [f.level for f in verdicts(folder)["gguf"].findings] == ["warning"]
    assert verdicts(folder, llama)["gguf"].taken is False
    assert "merge_and_unload changes the embedding" in words(verdicts(folder, llama)["peft"])
    assert verdicts(folder, untied)["gguf"].findings == ()


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_llama_cpp_rejects_lora_of_a_tied_head_or_embedding_and_suggests_a_merge(module, make, llama, untied):
    """Tried with llama.cpp: it refuses LoRA of the head, and with LoRA of the embedding it aborts at the head."""
    folder = make(llama, target_modules=[module, "q_proj", "v_proj"])
    assert [f.level for f in verdicts(folder)["gguf"].findings] == ["warning"]
    (finding,) = verdicts(folder, llama)["gguf"].findings
    assert finding.level == "error"
    assert verdicts(folder, untied)["gguf"].findings == ()
    command = finding.change.removeprefix("run ").partition(",")[0]
    words = command.replace("BASE", str(llama)).replace("MERGED", str(folder.with_name("merged"))).split()
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    assert (done.returncode, words[:2]) == (0, ["adaptkit", "merge"]), done.stderr


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickled_weights_are_accepted_but_not_read(name, make):
    folder = make()
    (folder / PLAIN_NAME).rename(folder / name)
    report = check(folder)
    assert report.taken
    assert any(name in text for text in report.unknown)
    assert all(name in words(verdict) for verdict in report.verdicts)
    (folder / name).unlink()
    assert taken(folder) == set()


STRANGE = [None, 0, -1.5, "(", ["x"], {"(": 1}, {"q_proj": "x"}, [[1]], True]


def test_strange_configuration_values_still_get_a_verdict(make, untied):
    folder = make()
    original = json.loads((folder / "adapter_config.json").read_text())
    for key in original:
        for value in STRANGE:
            (folder / "adapter_config.json").write_text(json.dumps(original | {key: value}))
            assert len(check(folder, base=untied).verdicts) == 4, (key, value)


def test_impossible_tensor_shapes_are_rejected(make, untied):
    folder = make()
    whole = load_file(folder / PLAIN_NAME)
    for name in (f"{UP}.lora_A.weight", f"{UP}.lora_B.weight"):
        for shape in ((), (0,), (7,), (0, 64), (4, 0), (2, 3, 4)):
            save_file(whole | {name: torch.zeros(shape)}, folder / PLAIN_NAME)
            assert not verdicts(folder, untied)["peft"].taken, (name, shape)


def test_every_file_in_targets_defines_a_target(make):
    assert discovery.names(targets) == ["gguf", "peft", "sglang", "vllm"]
    for name in discovery.names(targets):
        assert isinstance(discovery.load(targets, name, "TARGET"), Target)
    assert [v.target for v in check(make(), ["vllm", "gguf", "vllm"]).verdicts] == ["vllm", "gguf"]


def test_invalid_paths_targets_and_configurations_are_refused(tmp_path, llama, make):
    with pytest.raises(UsageError, match="does not exist"):
        check(tmp_path / "absent")
    with pytest.raises(UsageError, match="'tgi'"):
        check(llama, ["tgi"])
    with pytest.raises(UsageError, match="not an adapter"):
        check(llama, base=llama)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        check(tmp_path)
    folder = make()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        check(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        check(folder)


def test_an_adapter_with_a_wrong_task_type_is_judged_by_its_modules(llama, adapter, copy_of):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = copy_of(adapter)
    peft_adapters.change_config(folder, task_type="FEATURE_EXTRACTION")
    assert check(folder, ["peft"], base=llama).taken
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), folder)
    assert all(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


ODD = (5, 10**400, "((", [[5]], {"a": [1]}, {".*": 10**400})
"""Values of many types, most of which are wrong for any key."""


def judged_with_odd_values(folder, name, more, judge):
    """Set every key of a configuration to every odd value: ``judge`` must return or raise an ``AdaptkitError``."""
    path = folder / name
    plain = json.loads(path.read_text())
    for key in (*plain, *more):
        for value in ODD:
            path.write_text(json.dumps(plain | {key: value}))
            with contextlib.suppress(AdaptkitError):
                judge()
    path.write_text(json.dumps(plain))


def test_odd_values_in_an_adapters_configuration_never_crash_check(make, untied):
    folder = make(modules_to_save=["lm_head"], rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 2})
    more = ("use_rslora", "unknown")
    judged_with_odd_values(folder, "adapter_config.json", more, lambda: check(folder))


def test_odd_values_in_a_checkpoints_configuration_never_crash_check(make, untied, copy_of):
    folder, base = make(), copy_of(untied)
    more = ("text_config", "vision_config", "quantization_config", "num_experts")
    judged_with_odd_values(base, "config.json", more, lambda: check(base))
    judged_with_odd_values(base, "config.json", more, lambda: check(folder, base=base))


@pytest.mark.parametrize("write", [tiny.write_gpt2, tiny.write_llama])
def test_a_stored_head_counts_as_tied_where_transformers_and_merge_tie_it(tmp_path, write):
    """Without ``tie_word_embeddings`` the architecture decides: GPT-2's head is tied, Llama's is not."""
    base = write(tmp_path / "base")
    path = base / "model.safetensors"
    with edited_tensors(path) as tensors:
        table = next(value for name, value in tensors.items() if name.endswith(("wte.weight", "embed_tokens.weight")))
        tensors["lm_head.weight"] = table.clone()
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config))
    with peft_adapters.quiet():
        folder = tiny.write_peft_adapter(tmp_path / "adapter", base, target_modules=["lm_head"])
        model = peft_adapters.load_float32(base)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (write is tiny.write_gpt2)
    assert ("ties it to the embedding" in words(verdicts(folder, base)["gguf"])) == tied
    with pytest.raises(BaseMismatchError, match="ties its head") if tied else contextlib.nullcontext():
        merge(base, [folder], tmp_path / "merged")


def test_an_mlx_adapter_gets_one_finding_whose_conversion_equals_fusing_in_mlx(tmp_path, untied):
    """An adapter as mlx-lm 0.32 writes it, and the same one converted as the hint says."""
    generator, name, rank, scale = torch.Generator().manual_seed(0), "model.layers.0.mlp.up_proj", 8, 20.0
    weight = load_file(untied / "model.safetensors")[f"{name}.weight"].float()
    out, into = weight.shape
    a, b = (torch.randn(shape, generator=generator) / 10 for shape in ((into, rank), (rank, out)))
    mlx, converted = tmp_path / "mlx", tmp_path / "converted"
    for folder, named in (
        (mlx, {"adapters.safetensors": {f"{name}.lora_a": a, f"{name}.lora_b": b}}),
        (converted, {PLAIN_NAME: {f"{UP}.lora_A.weight": a.T.contiguous(), f"{UP}.lora_B.weight": b.T.contiguous()}}),
    ):
        folder.mkdir()
        for file, tensors in named.items():
            save_file(tensors, folder / file)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": rank, "scale": scale}}
    (mlx / "adapter_config.json").write_text(json.dumps(config))
    for verdict in check(mlx, base=untied).verdicts:
        (finding,) = verdict.findings
        assert (verdict.taken, finding.level) == (False, "error")
        with pytest.raises(AdaptkitError, match="an MLX adapter") as refused:
            merge(untied, [mlx], tmp_path / "merged")
        assert finding.change == refused.value.hint
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": scale * rank}
    (converted / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["up_proj"]}))
    assert verdicts(converted, untied)["peft"].taken
    merge(untied, [converted], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"].float()
    fused = weight + (scale * b.T) @ a.T  # as mlx_lm.fuse does
    assert torch.allclose(merged, fused, rtol=1e-2, atol=1e-2)
