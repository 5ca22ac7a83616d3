"""Selected modules are those that bitsandbytes converts, whether found by architecture or by names and shapes."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import bitsandbytes as bnb
import pytest
import tiny
import torch
from folders import edit_json, edited_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from adaptkit.checkpoint.header import write_header
from adaptkit.checkpoint.layout import index_bytes
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import AdaptkitError, CheckpointError, UsageError
from adaptkit.numerics.dtypes import dtype_name
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations._quantize import selection as selecting
from adaptkit.operations._quantize.selection import skip_modules
from adaptkit.operations._roles import find_roles, roles_by_architecture, roles_by_name, stores_transposed
from adaptkit.operations._usual_names import USUAL_NAMES, has_usual_names
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.quantize import QuantizeOptions, quantize

UNTIED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "mixtral", "qwen2_moe", "qwen3_moe"]
UNTIED += ["granitemoe", "jetmoe"]
FUSED = ["mixtral-fused", "qwen2_moe-fused", "qwen3_moe-fused"]
FAMILIES = [*UNTIED, *FUSED, "llama-tied", "gemma-tied", "gpt2", "gpt2-of-the-hub"]
TIED = ["llama-tied", "gemma-tied", "gpt2", "gpt2-of-the-hub"]
ARCHITECTURES = [
    "bloom", "blt", "codegen", "cohere2", "exaone4", "falcon", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gptj", "granitemoe", "jamba", "jetmoe", "llama", "mamba", "mixtral", "mpt", "olmo2", "opt", "phi",
    "phi3", "qwen2_moe", "qwen3", "smollm3", "stablelm", "starcoder2", "zamba", "zamba2",
]  # fmt: skip
CHOSEN = {"mistral": 14, "qwen3": 14, "phi": 12, "phi3": 8, "gpt2": 8, "mixtral": 8, "qwen2_moe": 14, "qwen3_moe": 8}
CHOSEN |= {"granitemoe": 8, "jetmoe": 2}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """One folder per family."""
    root = tmp_path_factory.mktemp("families")
    for name in [*UNTIED, *FUSED]:
        family, _, fused = name.partition("-")
        tiny.write_family(root / name, family, fused_experts=bool(fused))
    for name in ("llama", "gemma"):
        tiny.write_family(root / f"{name}-tied", name, tied=True)
    tiny.write_gpt2(root / "gpt2", dtype="bfloat16")
    tiny.write_gpt2(root / "gpt2-of-the-hub", dtype="bfloat16")
    weights = root / "gpt2-of-the-hub" / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(weights).items()}
    bare |= {f"h.{number}.attn.bias": torch.ones(1, 1, 128, 128).tril() for number in (0, 1)}
    save_file(bare, weights, metadata={"format": "pt"})
    return root


def select(checkpoint, roles=None, **options):
    return selecting.select(checkpoint, roles or find_roles(checkpoint), QuantizeOptions(**options))


def summary(folder, **options):
    """Return a selection in JSON's types."""
    selection = select(Checkpoint(Path(folder)), **options)
    return {
        "choices": [[c.spec.name, c.kept_because, c.transposed] for c in selection.choices],
        "skip": skip_modules(selection),
        "read_from": selection.read_from,
    }


@pytest.fixture(scope="module")
def without_transformers(families):
    """The summaries that an installation without transformers gives."""
    code = (
        "import json, sys; sys.modules['transformers'] = None; from pathlib import Path\n"
        "from adaptkit.checkpoint.reader import Checkpoint\n"
        "from adaptkit.operations._quantize.selection import select, skip_modules\n"
        "from adaptkit.operations._roles import find_roles\n"
        "from adaptkit.operations.options import QuantizeOptions\n"
        "def summary(folder, **options):\n"
        "    c = Checkpoint(folder)\n"
        "    s = select(c, find_roles(c), QuantizeOptions(**options))\n"
        "    choices = [[c.spec.name, c.kept_because, c.transposed] for c in s.choices]\n"
        "    return {'choices': choices, 'skip': skip_modules(s), 'read_from': s.read_from}\n"
        "folders = sorted(Path(sys.argv[1]).iterdir())\n"
        "print(json.dumps({f.name: [summary(f), summary(f, moe='quantize')] for f in folders}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, families], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def load(folder, **options):
    options = {"device_map": "cpu", "dtype": torch.bfloat16} | options
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_selected_modules_are_those_that_bitsandbytes_converts_except_routers(families, family, without_transformers):
    """Of tensors that stay, the reason is right; names and shapes alone give the same."""
    model = load(families / family, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    theirs = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    if family.startswith("qwen2_moe"):
        theirs -= {f"model.layers.{number}.mlp.shared_expert_gate" for number in (0, 1)}
    theirs -= {name for name in theirs if name.endswith(".router.layer")}  # of Granite and JetMoe
    prefix = "transformer." if family == "gpt2-of-the-hub" else ""
    checkpoint = Checkpoint(families / family)
    selection = select(checkpoint)
    chosen = [choice for choice in selection.choices if not choice.kept_because]
    assert {prefix + choice.module for choice in chosen} == theirs
    assert len(theirs) == CHOSEN.get(family, len(theirs))
    usual = f"names and shapes (usual for {family.removesuffix('-tied')})"
    is_usual = has_usual_names(checkpoint)
    assert selection.read_from.startswith(usual if is_usual else f"architecture {type(model).__name__}")
    assert {choice.transposed for choice in chosen} == {family.startswith("gpt2")}  # whose Conv1D are
    assert all(choice.transposed == stores_transposed(checkpoint, choice.module) for choice in chosen)
    if family in TIED:  # although no file contains the head
        assert skip_modules(selection) == ["lm_head"]

    kept = Counter(choice.kept_because for choice in selection.choices if choice.kept_because)
    experts = {"mixtral": 24, "qwen2_moe": 24, "qwen3_moe": 24, "granitemoe": 4, "jetmoe": 8}
    experts = experts.get(family, 4 * family.endswith("-fused"))
    assert kept["head"] == (family not in TIED)
    assert kept["embedding"] == 1 + family.startswith("gpt2")
    assert kept["expert: bitsandbytes cannot load it quantized"] == experts
    assert kept["router"] == (4 if family.startswith(("qwen2_moe", "jetmoe")) else 2 if experts else 0)
    norms = {"qwen3": 9, "qwen3_moe": 9, "qwen3_moe-fused": 9, "phi": 3}.get(family, 5)
    assert kept["norm"] == norms
    other = set(kept) - {"head", "embedding", "expert: bitsandbytes cannot load it quantized", "router", "norm", "bias"}
    assert other == ({"not a weight"} if family == "gpt2-of-the-hub" else set())  # the causal masks
    assert all(choice.kept_because for choice in selection.choices if len(choice.spec.shape) != 2)

    for found, options in zip(without_transformers[family], ({}, {"moe": "quantize"}), strict=True):
        expected = summary(families / family, **options)
        assert found["choices"] == expected["choices"]
        assert found["skip"] == expected["skip"]
        reason = "usual for " if is_usual else "transformers is not installed)"
        assert found["read_from"].startswith(f"names and shapes ({reason}")


@pytest.mark.parametrize(
    ("family", "include_head"),
    [*((family, False) for family in FAMILIES), *((family, True) for family in ("llama", "phi", "mixtral"))],
)
def test_bitsandbytes_loads_all_keys_and_gives_the_dequantized_logits(families, family, include_head, tmp_path):
    """In training mode, where bitsandbytes' layer computes exactly a linear layer with the dequantized weight."""
    options = QuantizeOptions(include_head=include_head)
    quantize(families / family, tmp_path / "packed", options)
    dequantize(tmp_path / "packed", tmp_path / "plain")
    packed, notes = load(tmp_path / "packed", output_loading_info=True)
    assert not any(notes.values())
    assert isinstance(packed.get_output_embeddings(), bnb.nn.Linear4bit) == include_head
    tokens = torch.arange(3, 43).view(2, 20)
    found, expected = packed.train()(tokens).logits, load(tmp_path / "plain").train()(tokens).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_a_head_that_is_the_embedding_cannot_be_quantized(families, family, tmp_path):
    with pytest.raises(UsageError, match="the head is tied to the embedding"):
        quantize(families / family, tmp_path / "packed", QuantizeOptions(include_head=True))


def test_the_skip_list_has_routers_and_experts_once_per_layer(families):
    layers = [f"model.layers.{number}.block_sparse_moe" for number in (0, 1)]
    expected = ["lm_head", *(f"{layer}.{part}" for layer in layers for part in ("experts", "gate"))]
    assert skip_modules(select(Checkpoint(families / "mixtral"))) == expected
    assert skip_modules(select(Checkpoint(families / "mixtral"), moe="quantize", include_head=True)) == [
        f"{layer}.gate" for layer in layers
    ]


def test_a_skipped_module_is_listed_by_its_path_in_the_file_and_in_the_model(families):
    selection = select(Checkpoint(families / "gpt2-of-the-hub"), skip=("*.0.mlp.c_fc",))
    assert skip_modules(selection) == ["h.0.mlp.c_fc", "lm_head", "transformer.h.0.mlp.c_fc"]
    assert [c.spec.name for c in selection.choices if c.kept_because == "skipped by --skip"] == ["h.0.mlp.c_fc.weight"]


def test_tensors_that_stay_anyway_keep_their_reason_when_skipped(families):
    selection = select(Checkpoint(families / "llama"), skip=("*",))
    assert {choice.kept_because for choice in selection.choices} == {"skipped by --skip", "head", "norm", "embedding"}


@pytest.mark.parametrize("family", ["granitemoe", "jetmoe"])
def test_experts_that_files_do_not_call_so_are_selected_on_request_and_their_routers_stay(families, family):
    choices = select(Checkpoint(families / family), moe="quantize").choices
    stacks = {choice.spec.name for choice in choices if len(choice.spec.shape) == 3}
    assert len(stacks) == (4 if family == "granitemoe" else 8)
    kept = {choice.spec.name: choice.kept_because for choice in choices if choice.kept_because}
    assert not stacks & set(kept)
    assert {why for name, why in kept.items() if ".router." in name} == {"router"}


@pytest.mark.parametrize("family", ["mixtral", *FUSED])
def test_experts_are_selected_on_request(families, family):
    chosen = {c.module for c in select(Checkpoint(families / family), moe="quantize").choices if not c.kept_because}
    experts = {name for name in chosen if ".experts." in name}
    plain = {c.module for c in select(Checkpoint(families / family)).choices if not c.kept_because}
    assert experts == chosen - plain
    assert len(experts) == (24 if family == "mixtral" else 4)


def test_a_stack_of_experts_stays_if_a_block_would_straddle_two_experts(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.FAMILIES, "qwen3_moe", tiny.FAMILIES["qwen3_moe"] | {"moe_intermediate_size": 48})
    checkpoint = Checkpoint(tiny.write_family(tmp_path / "moe", "qwen3_moe", fused_experts=True))
    sizes, fitting = {"gate_up_proj": 96 * 64, "down_proj": 48 * 64}, set()
    for block_size in (1024, 2048, 4096):
        for choice in select(checkpoint, moe="quantize", block_size=block_size).choices:
            if ".experts." in choice.spec.name:
                matrix = choice.module.rpartition(".")[2]
                fits = sizes[matrix] % block_size == 0
                assert choice.kept_because == ("" if fits else "expert: size is not a multiple of the block size")
                fitting |= {(matrix, block_size)} if fits else set()
    assert fitting == {("gate_up_proj", 1024), ("gate_up_proj", 2048), ("down_proj", 1024)}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_transformers_converts_the_selected_modules_in_every_architecture(model_type, tmp_path):
    """transformers' own rule is applied to our skip list and to its model; the files are headers and sparse data."""
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = {n: t for n, t in network.state_dict().items() if n not in network.all_tied_weights_keys}
    specs = [TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()]
    files = {spec.name: f"model-{number // 20}.safetensors" for number, spec in enumerate(specs)}
    for name in set(files.values()):
        inside = [spec for spec in specs if files[spec.name] == name]
        with (tmp_path / name).open("wb") as file:
            file.write(write_header(inside))
            file.truncate(file.tell() + sum(spec.nbytes for spec in inside))
    (tmp_path / "model.safetensors.index.json").write_bytes(index_bytes(files.items(), 0))
    config.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    always = list(network._keep_in_fp32_modules or [])
    answers = [find_roles(checkpoint), roles_by_architecture(checkpoint)]
    if not model_type.startswith("zamba"):  # names do not show which layers share a weight
        answers.append(roles_by_name(checkpoint, "asked to"))
    for roles in answers:
        selection = select(checkpoint, roles=roles)
        listed = [*skip_modules(selection), *always]
        linears = [n for n, m in network.named_modules() if type(m) is torch.nn.Linear or isinstance(m, Conv1D)]
        converted = {name for name in linears if should_convert_module(name, listed)}
        assert {choice.module for choice in selection.choices if not choice.kept_because} == converted
        assert converted or model_type == "falcon"


def write_usual(model_type, folder):
    """Write a tiny model of one of ``USUAL_NAMES``."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **sizes, **tokens, num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", USUAL_NAMES)
def test_names_of_usual_models_say_what_transformers_own_model_says(model_type, tmp_path):
    checkpoint = Checkpoint(write_usual(model_type, tmp_path))
    assert has_usual_names(checkpoint)
    named, asked = find_roles(checkpoint), roles_by_architecture(checkpoint)
    assert (named.of, named.head, named.tied) == (asked.of, asked.head, asked.tied)
    assert (named.read_from, asked.read_from[:12]) == (f"names and shapes (usual for {model_type})", "architecture")
    choices = [select(checkpoint, roles=roles) for roles in (named, asked)]
    assert skip_modules(choices[0]) == skip_modules(choices[1])
    assert choices[0].choices == choices[1].choices


DOWN = "model.layers.1.mlp.down_proj.weight"


def test_a_config_that_does_not_fit_the_files_is_not_usual(llama, copy_of):
    assert has_usual_names(Checkpoint(llama))
    configs = [{"num_hidden_layers": layers} for layers in (3, "2", None)]
    configs += [{"hidden_size": 32}, {"hidden_size": None, "head_dim": None}, {"num_attention_heads": None}]
    configs += [{"architectures": ["LlamaForSequenceClassification"]}, {"model_type": "phi3"}]
    for number, config in enumerate(configs):
        assert not has_usual_names(changed(llama, copy_of, name=str(number), **config)), config
    for name, edit in {
        "more": lambda tensors: tensors | {f"{DOWN}_scale": torch.ones(64, 64)},
        "less": lambda tensors: {key: value for key, value in tensors.items() if key != DOWN},
        "another shape": lambda tensors: tensors | {DOWN: torch.ones(64, 64)},
    }.items():
        assert not has_usual_names(changed(llama, copy_of, edit, name)), name


def test_nothing_loads_transformers_or_torch_for_a_usual_model(llama, tmp_path):
    code = "import sys; from adaptkit.operations.quantize import quantize; quantize(*sys.argv[1:])\n"
    code += "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    command = [sys.executable, "-c", code, llama, tmp_path / "out"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"


def changed(folder, copy_of, tensors=None, name="", **config):
    """Copy a folder and change its configuration, and its tensors."""
    folder = copy_of(folder, name)
    edit_json(folder / "config.json", **config)
    if tensors is not None:
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return Checkpoint(folder)


def test_a_model_that_transformers_does_not_know_is_read_by_names(families, copy_of):
    unknown = select(changed(families / "qwen2", copy_of, model_type="brand_new"))
    assert unknown.read_from == "names and shapes (transformers does not know model_type 'brand_new')"
    known = select(Checkpoint(families / "qwen2"))
    assert [choice.kept_because for choice in unknown.choices] == [choice.kept_because for choice in known.choices]


def test_tensors_that_the_architecture_lacks_are_read_by_names_and_counted(families, copy_of):
    extra = {"model.layers.2.mtp.proj.weight": torch.ones(64, 64)}
    selection = select(changed(families / "llama", copy_of, lambda tensors: tensors | extra))
    assert "; names and shapes for 1 tensor that it does not have" in selection.read_from
    assert "model.layers.2.mtp.proj" in {choice.module for choice in selection.choices if not choice.kept_because}


def test_tensors_that_the_files_lack_are_counted(families, copy_of):
    lost = "model.layers.1.mlp.down_proj.weight"
    selection = select(changed(families / "llama", copy_of, lambda tensors: tensors.pop(lost) is None or tensors))
    assert f"; the files lack 1 tensor of LlamaForCausalLM, such as {lost}, which" in selection.read_from
    whole = {folder.name: select(Checkpoint(folder)).read_from for folder in families.iterdir()}
    assert not [name for name, read_from in whole.items() if "lack" in read_from]


@pytest.mark.parametrize("name", tiny.OTHER_CLASSES)
def test_models_other_than_language_models_are_not_reported_to_lack_a_head(name, tmp_path):
    base = tiny.write_class(tmp_path / "base", name)
    assert "lack" not in select(Checkpoint(base)).read_from
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["OfNobody"]}))
    told = select(Checkpoint(base)).read_from
    assert "lm_head" not in told
    assert "cls.predictions.decoder" not in told
    (base / "config.json").write_text(json.dumps(config))
    with edited_tensors(base / "model.safetensors") as tensors:
        lost = next(name for name in sorted(tensors) if "layers.1." in name or "layer.1." in name)
        del tensors[lost]
    assert f"; the files lack 1 tensor of {name}, such as {lost}, which" in select(Checkpoint(base)).read_from


def test_a_weight_of_an_unsupported_dtype_stays_with_that_reason(families, copy_of):
    name = "model.layers.0.mlp.up_proj.weight"
    doubled = changed(families / "llama", copy_of, lambda tensors: tensors | {name: tensors[name].double()})
    selection = select(doubled)
    assert {c.spec.name for c in selection.choices if c.kept_because == "dtype F64"} == {name}
    assert skip_modules(selection) == ["lm_head", name.removesuffix(".weight")]


HUGE, INVALID = 10**9, "nope"
INVALID_CONFIGS = [
    *({"num_hidden_layers": layers} for layers in (HUGE, "2", None)),
    *({key: HUGE} for key in ("num_labels", "num_experts", "pad_token_id")),
    *({"nested": {"depths": [2, HUGE]}}, {"vocab_size": 10**30}, {"vocab_size": -3}),
    {"model_type": "gpt_neo", "attention_types": [[["global"], HUGE]]},
    *({"hidden_size": [64]}, {"num_attention_heads": 0}, {"layer_types": [INVALID, INVALID]}),
    *({"rope_parameters": {"rope_type": INVALID}}, {"tie_word_embeddings": "yes"}, {"hidden_act": INVALID}),
    *({"text_config": 5}, {"dtype": INVALID}, {"self": 3}),
]


@pytest.mark.parametrize("config", INVALID_CONFIGS, ids=str)
def test_an_invalid_configuration_is_a_one_line_error(families, copy_of, config):
    checkpoint = changed(families / "phi", copy_of, **config)
    with pytest.raises(AdaptkitError) as caught:
        select(checkpoint)
    assert isinstance(caught.value, UsageError | CheckpointError)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_kernels_named_in_a_configuration_are_not_fetched_and_huge_sizes_allocate_nothing(families, copy_of, key):
    """transformers treats ``owner/name`` in these keys as a kernel on the Hub."""
    huge = {"vocab_size": 10**12, "max_position_embeddings": 10**15}
    selection = select(changed(families / "mixtral", copy_of, **huge, **{key: "someone/kernel"}))
    assert sum(not choice.kept_because for choice in selection.choices) == 8
