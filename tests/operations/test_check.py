"""Verdicts on adapters for peft are compared with what the installed peft does."""

import contextlib
import json
import os
import re
from pathlib import Path

import peft
import peft_adapters
import pytest
import tiny
import torch
from folders import edit_json, edited_tensors
from safetensors.torch import load_file, save_file
from verdicts import UP, WEIGHTS, configure, levels, rewrite, taken, verdicts, words

from adaptkit import discovery
from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.errors import AdapterError, AdaptkitError, BaseMismatchError, CheckpointError, UsageError
from adaptkit.operations import targets
from adaptkit.operations.check import check
from adaptkit.operations.merge import merge
from adaptkit.operations.targets._target import Program

ROOT = Path(__file__).resolve().parents[2]
FAILURES = (LookupError, RuntimeError, ValueError, TypeError, AttributeError, ImportError, re.error)


def with_peft(folder, base, vocabulary=None):
    with peft_adapters.quiet():
        return peft.PeftModel.from_pretrained(peft_adapters.load_float32(base, vocabulary), folder)


def peft_takes(folder, base, vocabulary=None):
    """Whether peft loads every tensor of the file, and adds no LoRA that the file does not have."""
    try:
        model = with_peft(folder, base, vocabulary)
        with peft_adapters.quiet():
            adapter = peft.get_peft_model_state_dict(model)
    except FAILURES:
        return False
    arrived, file = model.state_dict() | adapter, load_file(folder / WEIGHTS)
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
        found = verdicts(case.adapter, base, ["peft"])["peft"]
        assert {finding.level for finding in found.findings} <= {"warning"}
        assert "target_parameters" not in words(found)


@pytest.mark.parametrize("kind", ["resized", "resized_embedding", "resized_tied", "resized_head_tied"])
def test_an_adapter_of_a_resized_vocabulary_needs_a_resized_base(kind, made):
    case = peft_adapters.make(made, kind)
    entries = case.case.vocabulary
    assert not peft_takes(case.adapter, case.base)
    assert peft_takes(case.adapter, case.base, entries)
    assert levels(verdicts(case.adapter, case.base)["peft"], f"resize_token_embeddings({entries})") == {"warning"}
    assert taken(case.adapter, case.base) == {"peft"}
    assert "resize_token" not in words(verdicts(case.adapter)["peft"])


@pytest.mark.parametrize(
    "kind", ["AdaLoRA", "IA3", "VeRA", "LoHa", "a prompt", "trainable tokens alone", "KaSA", "aLoRA"]
)
def test_other_adapter_types_and_lora_variants_get_a_verdict(kind, llama, tmp_path):
    folder = peft_adapters.write_refused(tmp_path / "adapter", kind, llama)
    assert taken(folder, llama) == ({"peft", "gguf"} if kind == "aLoRA" else {"peft"})
    merges = [words(verdict) for verdict in verdicts(folder, llama).values() if "adaptkit merge" in words(verdict)]
    assert not merges  # it would refuse them


@pytest.mark.parametrize("layer", ["Conv1d", "Conv2d", "Conv3d", "MultiheadAttention"])
def test_only_peft_accepts_lora_of_convolutions_and_multihead_attention(layer, tmp_path):
    """peft gives the latter two pairs, with names of their own."""
    is_attention = layer == "MultiheadAttention"
    base = torch.nn.ModuleDict({"at": getattr(torch.nn, layer)(*((16, 2) if is_attention else (8, 6, 3)))})
    before = {name: value.clone() for name, value in base.state_dict().items()}
    config = peft.LoraConfig(target_modules=["at"], r=4, init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    fresh = torch.nn.ModuleDict({"at": getattr(torch.nn, layer)(*((16, 2) if is_attention else (8, 6, 3)))})
    fresh.load_state_dict(before)
    merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()
    changed = [name for name, value in before.items() if not torch.equal(merged[name], value)]
    assert len(changed) == (2 if is_attention else 1)  # peft loads all of it
    assert taken(tmp_path / "adapter") == {"peft"}
    what = "torch.nn.MultiheadAttention: at.base_layer.out_proj" if is_attention else "convolutions: at"
    for program in ("vllm", "sglang", "gguf"):
        assert levels(verdicts(tmp_path / "adapter")[program], f"LoRA of {what}") == {"error"}
    if is_attention:
        with pytest.raises(AdapterError, match=r"at is a torch\.nn\.MultiheadAttention, of which LoRA is not"):
            read_adapter(tmp_path / "adapter")


def within(wrapper, tensors):
    """Rename tensors as if the model was inside a wrapper."""
    return {name.replace("base_model.model.", f"base_model.model.{wrapper}."): v for name, v in tensors.items()}


WRAPPED = {
    "a compiled model": lambda t: within("_orig_mod", t),
    "data parallelism": lambda t: within("module", t),
    "a doubled prefix": lambda t: within("base_model.model", t),
}
UNFIT = {
    "one key more": lambda t: t | {f"{UP}.lora_C.weight": torch.ones(3)},
    "half of a pair": lambda t: {name: tensor for name, tensor in t.items() if name != f"{UP}.lora_B.weight"},
    "another rank": lambda t: t | {f"{UP}.lora_A.weight": torch.ones(2, 64), f"{UP}.lora_B.weight": torch.ones(128, 2)},
    "no matrix": lambda t: t | {f"{UP}.lora_A.weight": torch.ones(64)},
}
BROKEN = WRAPPED | UNFIT | {
    "no prefix": lambda t: {name.removeprefix("base_model.model."): tensor for name, tensor in t.items()},
    "another prefix": lambda t: {name.replace("base_model.model.", "base_model."): v for name, v in t.items()},
    "another adapter's name": lambda t: {name.replace("lora_A.", "lora_A.other."): v for name, v in t.items()},
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
    "one module more": lambda t: t | {
        f"{UP}2.lora_A.weight": torch.ones(4, 64),
        f"{UP}2.lora_B.weight": torch.ones(8, 4),
    },
    "magnitudes unasked": lambda t: t | {f"{UP}.lora_magnitude_vector": torch.ones(128)},
    "a bias of B unasked": lambda t: t | {f"{UP}.lora_B.bias": torch.ones(128)},
    "rows unasked": lambda t: t | {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 64)
    },
}  # fmt: skip
MISCONFIGURED = {
    "another r": {"r": 8},
    "r that is not an integer": {"r": 4.0},
    "an alpha pattern with a text": {"alpha_pattern": {"up_proj": "3"}},
    "an excluded layer": {"layers_to_transform": [0]},
    "one layer by its number": {"layers_to_transform": 1},
    "layers beside a pattern of modules": {"target_modules": ".*_proj", "layers_to_transform": [0, 1]},
    "a name of layers without numbers": {"layers_pattern": "layers"},
    "a module within a saved one": {"modules_to_save": ["mlp"]},
    "a saved module that is not a pattern": {"modules_to_save": ["("]},
    "an unknown bias": {"bias": "weird"},
    "an unknown task type": {"task_type": "NOPE"},
    "an unknown initialization": {"init_lora_weights": "nonsense"},
    "an initialization that needs statistics": {"init_lora_weights": "corda"},
    "a dropout above one": {"lora_dropout": 2},
    "dora and lora_bias": {"use_dora": True, "lora_bias": True},
    "a name instead of a list": {"target_parameters": "up_proj.weight"},
    "a module, and its weight": {"target_parameters": ["up_proj.weight"]},
    "a number among names": {"target_parameters": ["nothing.weight", 1]},
    "a vector among the matrices": {"target_parameters": ["norm.weight"]},
    "no modules": {"target_modules": None},
    "alpha that is a text": {"lora_alpha": "16"},
    "an untargeted module": {"target_modules": ["q_proj"]},
    "an excluded module": {"exclude_modules": ["up_proj"]},
    "a pattern of another rank": {"rank_pattern": {"up_proj": 2}},
    "a saved module that is not there": {"modules_to_save": ["lm_head"]},
    "dora without magnitudes": {"use_dora": True},
    "lora_bias without biases": {"lora_bias": True},
    "patterns that are null": {"rank_pattern": None},
    "tokens that are not there": {"trainable_token_indices": [1, 2]},
    "an unknown peft type": {"peft_type": "FUTURE"},
}


@pytest.mark.parametrize("case", [*BROKEN, *MISCONFIGURED])
def test_adapters_that_peft_refuses_or_loads_only_in_part_are_rejected(case, make, untied):
    folder = make()
    if case in BROKEN:
        rewrite(folder, BROKEN[case])
    else:
        configure(folder, **MISCONFIGURED[case])
    assert not peft_takes(folder, untied)
    found = verdicts(folder, untied)
    assert not found["peft"].taken
    assert all(finding.change for finding in found["peft"].findings)
    if case in WRAPPED:
        assert not {"peft", "vllm"} & (taken(folder) | taken(folder, untied))
    if case in UNFIT:
        assert taken(folder) == set()
    if case == "one key more":
        assert all(levels(verdict, f"{UP}.lora_C.weight") == {"error"} for verdict in found.values())


LOADED = {
    "alpha of zero": {"lora_alpha": 0},
    "alpha below zero": {"alpha_pattern": {"up_proj": -3}},
    "an exclusion by the ends of names": {"exclude_modules": ["("]},
    "all layers by their name": {"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
    "a bias of its own kind": {"bias": "lora_only"},
    "a task that the base's class is not for": {"task_type": "FEATURE_EXTRACTION"},
    "beginnings in capitals": {"init_lora_weights": "GAUSSIAN"},
    "a dropout below zero": {"lora_dropout": -1},
    "a saved module that no model has": {"modules_to_save": ["score"]},
    "no names of parameters": {"target_parameters": {}},
    "names of no parameters": {"target_parameters": ["experts.nothing", "nothing"]},
    "numbers for names": {"target_parameters": [1]},
}
WARNED = {
    "alpha of zero": "changes nothing",
    "alpha below zero": "subtracts",
    "names of no parameters": "experts.nothing and 1 more, but the file has no tensor",
}


@pytest.mark.parametrize("case", LOADED)
def test_unusual_configurations_that_peft_loads_are_accepted(case, make, untied):
    folder = make()
    configure(folder, **LOADED[case])
    assert peft_takes(folder, untied)
    for base in (None, untied):
        verdict = verdicts(folder, base, ["peft"])["peft"]
        assert verdict.taken or (base is None and case == "a saved module that no model has")
        assert case not in WARNED or levels(verdict, WARNED[case]) == {"warning"}


def test_patterns_of_a_weight_in_target_parameters_are_those_of_the_parameter(make, untied):
    patterns = {"rank_pattern": {"up_proj.weight": 2}, "alpha_pattern": {"up_proj.weight": 6, "up_proj": 40}}
    folder = make(target_modules=[], target_parameters=["up_proj.weight"], **patterns)
    assert set(scalings(folder, untied).values()) == {(3, 2)}
    assert verdicts(folder, untied)["peft"].findings == ()
    assert levels(verdicts(folder, untied)["sglang"], "scales model.layers.0.mlp.up_proj and 1 more by 3") == {"error"}


@pytest.mark.parametrize(
    "lora",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"layers.0.mlp.up_proj": 3}}],
)
def test_programs_that_scale_differently_from_peft_are_reported(lora, make, untied):
    folder = make(**lora)
    config = json.loads((folder / "adapter_config.json").read_text())
    meant = scalings(folder, untied)
    alpha, flat = config["lora_alpha"], config["lora_alpha"] / config["r"]
    root = alpha / config["r"] ** 0.5 if config["use_rslora"] else flat
    for program, is_same in (
        ("sglang", all(scaling == flat for scaling, _ in meant.values())),
        ("gguf", all(scaling == alpha / rank for scaling, rank in meant.values())),
        ("vllm", all(scaling == pytest.approx(root) for scaling, _ in meant.values())),
    ):
        expected = set() if is_same else {"warning" if program == "vllm" else "error"}
        assert levels(verdicts(folder)[program], "adapter_config.json scales") == expected


NAMED = {
    "A and B": ({}, {"lora_A.": "lora_A.default.", "lora_B.": "lora_B.default."}, True),
    "magnitudes": ({"use_dora": True}, {"magnitude_vector": "magnitude_vector.default.weight"}, True),
    "older magnitudes": ({"use_dora": True}, {"magnitude_vector": "magnitude_vector.default"}, False),
    "biases": ({"lora_bias": True}, {"lora_B.bias": "lora_B.default.bias"}, True),
    "an embedding": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        {f"lora_embedding_{half}": f"lora_embedding_{half}.default" for half in "AB"},
        True,
    ),
    "rows": ({"trainable_token_indices": [1, 5]}, {"tokens_delta": "tokens_delta.default"}, False),
    "a head": ({"modules_to_save": ["lm_head"]}, {"lm_head.": "lm_head.modules_to_save.default."}, False),
}


@pytest.mark.parametrize("case", NAMED)
def test_tensor_names_with_the_adapters_name_are_accepted_where_peft_loads_them(case, make, untied):
    lora_config, names, loads = NAMED[case]
    folder = make(**lora_config)
    for old, new in names.items():
        rewrite(folder, lambda t, old=old, new=new: {name.replace(old, new): tensor for name, tensor in t.items()})
    assert peft_takes(folder, untied) == loads
    for base in (None, untied):
        assert verdicts(folder, base)["peft"].taken == loads


@pytest.mark.parametrize("module", ["lm_head", "model.layers.1.input_layernorm"])
def test_every_module_that_modules_to_save_matches_must_be_in_the_file(module, make, untied):
    folder = make(modules_to_save=["lm_head", "norm"])
    assert verdicts(folder, untied)["peft"].taken
    rewrite(folder, lambda t: {name: v for name, v in t.items() if name != f"base_model.model.{module}.weight"})
    assert not peft_takes(folder, untied)
    assert levels(verdicts(folder, untied)["peft"], f"{module}.weight: not in the file") == {"error"}


@pytest.mark.parametrize(
    ("indices", "loads", "runs"),
    [
        ([1, 300], True, True),
        ([1, -1], True, False),  # peft loads negative indices, but then fails when the model runs
        ([1, 301], False, False),
        ([1, 5, 7], False, False),
        ({"embed_tokens": [1]}, False, False),
    ],
)
def test_trained_token_indices_must_be_valid_for_loading_and_for_running(indices, loads, runs, make, untied):
    folder = make(trainable_token_indices=[1, 5])
    configure(folder, trainable_token_indices=indices)
    assert peft_takes(folder, untied) == loads
    if loads:
        with contextlib.nullcontext() if runs else pytest.raises(IndexError):
            with_peft(folder, untied)(torch.tensor([[1, 2]]))
    assert verdicts(folder, untied)["peft"].taken == runs


def test_adapter_names_need_the_models_prefix_even_if_the_bases_files_lack_it(tmp_path, gpt2, copy_of):
    """The Hub's GPT-2 has ``h.0.…``, which transformers names ``transformer.h.0.…``."""
    folder, bare = tiny.write_peft_adapter(tmp_path / "of-gpt2", gpt2), copy_of(gpt2)
    tensors = {name.removeprefix("transformer."): v for name, v in load_file(gpt2 / "model.safetensors").items()}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    for base in (gpt2, bare):
        assert peft_takes(folder, base)
        assert verdicts(folder, base)["peft"].findings == ()
    rewrite(folder, lambda t: {name.replace("model.transformer.", "model."): v for name, v in t.items()})
    assert not peft_takes(folder, bare)
    assert not verdicts(folder, bare)["peft"].taken


def lost_in(model, folder):
    """Return the tensors of an adapter that peft does not load into a model; None if it fails."""
    try:
        arrived = peft.PeftModel.from_pretrained(model, folder).state_dict()
    except FAILURES:
        return None
    same = {tensor.shape: [t for t in arrived.values() if t.shape == tensor.shape] for tensor in arrived.values()}
    file = load_file(folder / WEIGHTS)
    return [
        name for name, tensor in file.items() if not any(torch.equal(tensor, t) for t in same.get(tensor.shape, []))
    ]


@pytest.mark.parametrize("name", tiny.OTHER_CLASSES)
@pytest.mark.parametrize(
    ("task", "inner"),
    [(None, ""), (None, "model."), ("CAUSAL_LM", "model."), ("CAUSAL_LM", "bert."), ("FEATURE_EXTRACTION", "")],
)
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
    named = {f"base_model.model.{inner}{layer}.lora_{half}.weight": tensor for half, tensor in halves.items()}
    save_file(named, folder / WEIGHTS)
    loader = transformers.AutoModel if task == "FEATURE_EXTRACTION" else getattr(transformers, name)
    with peft_adapters.quiet():
        takes = lost_in(loader.from_pretrained(base), folder) == []
    assert verdicts(folder, base)["peft"].taken == takes


@pytest.mark.parametrize("has_head", [True, False])
def test_a_classifiers_adapter_must_contain_the_classification_head(has_head, tmp_path, untied):
    """peft adds the head to modules_to_save by itself, and a base that is a language model does not have one."""
    import transformers

    def model():
        return transformers.AutoModelForSequenceClassification.from_pretrained(untied, num_labels=2)

    folder, config = tmp_path / "adapter", peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    with peft_adapters.quiet():
        peft.get_peft_model(model(), config).save_pretrained(folder)
        if not has_head:
            rewrite(folder, lambda t: {name: tensor for name, tensor in t.items() if "score" not in name})
        assert (lost_in(model(), folder) == []) == has_head
    assert verdicts(folder, untied)["peft"].taken == has_head


@pytest.mark.parametrize("write", [tiny.write_gpt2, tiny.write_llama])
def test_a_stored_head_counts_as_tied_where_transformers_and_merge_tie_it(tmp_path, write):
    """Without ``tie_word_embeddings`` the architecture decides: GPT-2's head is tied, Llama's is not."""
    base = write(tmp_path / "base")
    with edited_tensors(base / "model.safetensors") as tensors:
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
    for program in ("gguf", "peft"):
        assert ("ties it to the embedding" in words(verdicts(folder, base)[program])) == tied
    with pytest.raises(BaseMismatchError, match="ties its head") if tied else contextlib.nullcontext():
        merge(base, [folder], tmp_path / "merged")


def test_missing_modules_are_only_a_warning_if_the_base_has_a_text_config(make, untied, copy_of):
    folder, base = make(), copy_of(untied)
    rewrite(folder, lambda t: {name.replace("model.layers", "decoder.layers"): tensor for name, tensor in t.items()})
    assert levels(verdicts(folder, base)["peft"], "no tensor of") == {"error"}
    edit_json(base / "config.json", text_config={})
    assert levels(verdicts(folder, base)["peft"], "no tensor of") == {"warning"}


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


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickled_weights_are_accepted_but_not_read(name, make):
    folder = make()
    (folder / WEIGHTS).rename(folder / name)
    report = check(folder)
    assert report.taken
    assert any(name in text for text in report.unknown)
    assert all(name in words(verdict) for verdict in report.verdicts)
    (folder / name).unlink()
    assert taken(folder) == set()


def test_impossible_tensor_shapes_are_rejected(make, untied):
    folder = make()
    whole = load_file(folder / WEIGHTS)
    for name in (f"{UP}.lora_A.weight", f"{UP}.lora_B.weight"):
        for shape in ((), (0,), (7,), (0, 64), (4, 0), (2, 3, 4)):
            save_file(whole | {name: torch.zeros(shape)}, folder / WEIGHTS)
            assert not verdicts(folder, untied)["peft"].taken, (name, shape)


ODD = (None, 0, -1.5, True, 10**400, "((", ["x"], [[5]], {"a": [1]}, {"(": 1}, {"q_proj": "x"}, {".*": 10**400})
"""Values of many types, most of which are wrong for any key."""


@pytest.mark.parametrize("file", ["adapter_config.json", "config.json"])
def test_odd_values_in_a_configuration_never_crash_check(file, make, untied, copy_of):
    """Every key has every value once: all programs give a verdict, or an error of ours says what is wrong."""
    is_adapter = file.startswith("adapter")
    folder, base = make(modules_to_save=["lm_head"], rank_pattern={"q_proj": 2}), copy_of(untied)
    path = (folder if is_adapter else base) / file
    plain = json.loads(path.read_text())
    more = ("unknown",) if is_adapter else ("text_config", "vision_config", "quantization_config", "num_experts")
    for key in (*plain, *more):
        for value in ODD if is_adapter else ODD[4:]:
            path.write_text(json.dumps(plain | {key: value}))
            with contextlib.nullcontext() if is_adapter else contextlib.suppress(AdaptkitError):
                assert len(check(folder, base=base if value in ODD[:6] or not is_adapter else None).verdicts) == 4, (
                    key,
                    value,
                )
            if not is_adapter:
                with contextlib.suppress(AdaptkitError):
                    check(base)


@pytest.mark.parametrize("kind", ["text", "nested", "pipe", "folder"])
def test_an_unreadable_added_tokens_file_is_ignored(make, kind):
    path = make() / "added_tokens.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("tokens" if kind == "text" else "[" * 100_000)
    assert verdicts(path.parent)["sglang"].findings == ()


def test_every_file_in_targets_defines_a_target(make):
    assert discovery.names(targets) == ["gguf", "peft", "sglang", "vllm"]
    for name in discovery.names(targets):
        target = discovery.load(targets, name, "TARGET")
        assert isinstance(target, Program)
        assert not target.tried_in or (ROOT / target.tried_in).is_file()
        source = "".join(path.read_text() for path in Path(targets.__file__).parent.glob("*.py"))
        for key in (*target.adapter, *target.checkpoint):  # a misspelled row would never be found
            assert source.count(f'"{key}"') > len(
                re.findall(rf'^ +"{key}": (?:error|warning|features)', source, re.M)
            ), key
    assert [v.target for v in check(make(), ["vllm", "gguf", "vllm"]).verdicts] == ["vllm", "gguf"]


def test_invalid_paths_targets_and_configurations_are_refused(tmp_path, llama, make):
    folder = make()
    for arguments, error, phrase in (
        ((tmp_path / "absent",), UsageError, "does not exist"),
        ((llama, ["tgi"]), UsageError, "'tgi'"),
        ((llama, (), llama), UsageError, "not an adapter"),
        ((tmp_path,), CheckpointError, "not a checkpoint"),
    ):
        with pytest.raises(error, match=phrase):
            check(*arguments)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        check(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        check(folder)


def test_weights_that_no_program_reads_are_reported(make):
    folder = make()
    assert not any("which none of these programs reads" in text for text in check(folder).unknown)
    (folder / "non_lora_trainables.bin").write_bytes(b"")
    assert "the contents of non_lora_trainables.bin, which none of these programs reads" in check(folder).unknown
