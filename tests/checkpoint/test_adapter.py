"""An adapter is read completely, or refused with an error that names the reason."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import peft
import peft_adapters
import pytest
import tiny
import torch
from folders import edit_json, edit_manifest, edited_tensors
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint import adapter as adapter_module
from adaptkit.checkpoint.adapter import read_adapter, write_adapter
from adaptkit.checkpoint.compensation import write_compensation
from adaptkit.checkpoint.foreign import mlx_hint
from adaptkit.checkpoint.hashing import fingerprint
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import COMPENSATION_NAME, is_adapter
from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest
from adaptkit.errors import AdapterError, CheckpointError, IntegrityError, UnsafeInputError, UsageError
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.tensors import as_array

KEY = "base_model.model.model.layers.0.self_attn.q_proj"
MODULE = "model.layers.0.self_attn.q_proj"


def configure(folder, **changes):
    path = folder / "adapter_config.json"
    edit_json(path, **changes)


def edit(folder, change):
    path = folder / "adapter_model.safetensors"
    with edited_tensors(path) as tensors:
        change(tensors)


@pytest.fixture
def changed(adapter, copy_of):
    return copy_of(adapter)


def scalings_of_peft(folder, base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


def test_an_adapter_of_peft_is_read_completely(adapter, llama):
    read = read_adapter(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert is_adapter(adapter)
    assert not is_adapter(llama)
    assert len(read.modules) == 14
    assert 2 * len(read.modules) == len(tensors) == len(read.records)
    assert read.manifest is None
    assert not read.fan_in_fan_out
    for module, term in read.modules.items():
        assert torch.equal(term.lora_a, tensors[f"base_model.model.{module}.lora_A.weight"])
        assert torch.equal(term.lora_b, tensors[f"base_model.model.{module}.lora_B.weight"])
        assert term.lora_b.abs().sum() > 0
    assert {r.name: r.xxh3_128 for r in read.records} == {name: fingerprint(as_array(t)) for name, t in tensors.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 3}, "alpha_pattern": {"q_proj": 16, "down_proj": 5}},
        {"use_rslora": True, "rank_pattern": {"model.layers.1.mlp.up_proj": 2}, "alpha_pattern": {".*o_proj": 1}},
        {"rank_pattern": {r"layers\.\d+\.self_attn\.[qk]_proj": 2, "q_proj": 6}},
        {"alpha_pattern": {r".*\.down_proj": 3, "^model.layers.0.mlp.up_proj": 9}},
    ],
)
def test_ranks_and_scalings_are_those_of_peft(tmp_path, llama, options):
    folder = tiny.write_peft_adapter(tmp_path / "a", llama, **options)
    read = read_adapter(folder)
    assert {name: term.scaling for name, term in read.modules.items()} == scalings_of_peft(folder, llama)
    assert {name: term.rank for name, term in read.modules.items()} == {
        name: load_file(folder / "adapter_model.safetensors")[f"base_model.model.{name}.lora_A.weight"].shape[0]
        for name in read.modules
    }


PEFT_MERGES, PEFT_DOES_NOT = "run or merge it with peft", "which cannot merge it either"
CONVERT, WITH_PEFT = "path_initial_model", "merge it with peft"
FIRST = "model.layers.0.mlp.down_proj.weight"
"""The first module by name, in every run."""
REFUSED: list[tuple[dict, str, str]] = [
    ({"use_qalora": True}, "use_qalora", PEFT_DOES_NOT),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens", PEFT_DOES_NOT),
    ({"arrow_config": {"x": 1}}, "arrow_config", PEFT_DOES_NOT),
    ({"use_bdlora": {"x": 1}}, "use_bdlora", PEFT_MERGES),
    ({"kasa_config": {"x": 1}}, "kasa_config", PEFT_MERGES),
    ({"something_new": {"scale": 2}}, "unknown key 'something_new'", "remove the key"),
    ({"use_dora": True}, "use_dora", ""),  # whose tensors are missing, as of the next four
    ({"trainable_token_indices": [0]}, "trainable_token_indices", ""),
    ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters", ""),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save", ""),
    ({"lora_bias": True}, "lora_bias", ""),
    ({"bias": "some"}, "bias is 'some'", "saved together"),
    ({"peft_type": "LOHA"}, "LOHA", "peft_type LORA"),
    ({"peft_type": None}, "has no peft_type", "convert it to peft's format"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which changes the base", CONVERT),
    ({"init_lora_weights": "olora"}, "olora, which changes the base", CONVERT),
    ({"init_lora_weights": "loftq"}, "loftq, which changes the base", WITH_PEFT),
    ({"init_lora_weights": "lora-ga"}, "lora-ga.*may have changed the base", "set it to true"),  # as ms-swift writes it
    *(({"r": r}, r"says rank .*lora_A has 4 rows", "") for r in (2, 8, 0, -4, 4.0, "4", None, True)),
    *(
        ({"lora_alpha": alpha}, f"{FIRST}: lora_alpha is {re.escape(repr(alpha)[:20])}", "saved together")
        for alpha in (0, -1, None, "8", True, [8], 10**400)
    ),
    *(
        ({f"{table}_pattern": patterns}, "pattern", "saved together")
        for table, patterns in (("rank", ["q_proj"]), ("alpha", "q_proj"), ("rank", {"(": 4}), ("alpha", {"*": 4}))
    ),
]


@pytest.mark.parametrize(("changes", "error", "hint"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_configuration_with_anything_unsupported_or_invalid_is_refused(changed, changes, error, hint):
    configure(changed, **changes)
    with pytest.raises(AdapterError, match=error) as caught:
        read_adapter(changed)
    assert hint in caught.value.hint
    if hint == PEFT_MERGES:
        assert "cannot" not in caught.value.hint


@pytest.mark.parametrize("name", peft_adapters.REFUSED)
def test_what_peft_writes_for_other_methods_is_refused_by_name(tmp_path, llama, name):
    adapter = peft_adapters.write_refused(tmp_path / "adapter", name, llama)
    with pytest.raises(AdapterError, match=peft_adapters.REFUSED[name][0]) as caught:
        read_adapter(adapter)
    assert caught.value.hint


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_are_refused(tmp_path, dims):
    layer = getattr(torch.nn, f"Conv{dims}d")(8, 8, 3)
    model = peft.get_peft_model(torch.nn.ModuleDict({"conv": layer}), peft.LoraConfig(target_modules=["conv"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="conv is a convolution; LoRA of convolutions is not supported") as caught:
        read_adapter(tmp_path / "adapter")
    assert caught.value.hint == "merge the adapter with peft"


def test_the_hint_for_pissa_names_the_converted_copy_that_llama_factory_saves(changed):
    shutil.copytree(changed, changed / "pissa_converted")
    configure(changed, init_lora_weights="pissa_niter_16")
    with pytest.raises(AdapterError) as caught:
        read_adapter(changed)
    assert str(changed / "pissa_converted") in caught.value.hint
    assert read_adapter(changed / "pissa_converted").modules


@pytest.mark.parametrize("begun", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_initializations_that_leave_the_base_unchanged_are_read(changed, begun):
    configure(changed, init_lora_weights=begun)
    assert len(read_adapter(changed).modules) == 14


A, B = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"
Q_CODES = torch.full((8, 1), torch.nan, dtype=torch.bfloat16)  # codes stored as a float dtype


def added(key, tensor=None):
    return lambda tensors: tensors.update({key: torch.ones(4, 64) if tensor is None else tensor})


def quantized_head(part):
    head = {"lm_head.base_layer.weight": Q_CODES, f"lm_head.base_layer.{part}": torch.ones(4, dtype=torch.uint8)}
    return lambda tensors: tensors.update({f"base_model.model.{name}": tensor for name, tensor in head.items()})


DAMAGED = {
    "no A": (lambda t: t.pop(A), f"{MODULE} has no lora_A", ""),
    "no B": (lambda t: t.pop(B), f"{MODULE} has no lora_B", ""),
    "B of rank 3": (lambda t: t.update({B: t[B][:, :3].clone()}), rf"{MODULE}.*lora_B has 3 columns", ""),
    "a vector": (added(A, torch.ones(4)), r"q_proj\.lora_A\.weight", ""),
    "three dimensions": (added(A, torch.ones(4, 8, 8)), r"q_proj\.lora_A\.weight", ""),
    "float64": (added(A, torch.ones(4, 64).double()), r"q_proj\.lora_A\.weight.*unsupported type", "BF16"),
    "rank zero": (added(A, torch.ones(0, 64)), r"has shape \[0, 64\]; expected 2 dimensions, none of them 0",
                  "rank of at least 1"),
    # Under ZeRO-3, a tensor has the shape [0] outside of the calls that gather it.
    "left empty by DeepSpeed": (lambda t: t.update({key: torch.zeros(0) for key in t}),
                                r"has shape \[0\]; expected 2 dimensions", "DeepSpeed ZeRO-3"),
    "NaN": (lambda t: t[B].view(-1).__setitem__(7, math.nan), r"lora_B\.weight holds NaN or infinity", ""),
    "infinity": (lambda t: t[B].view(-1).__setitem__(7, math.inf), r"lora_B\.weight holds NaN or infinity", ""),
    "a quantized head in 4 bits": (quantized_head("weight.quant_state.bitsandbytes__nf4"),
                                   "quantized weights that lm_head was trained on", "save_embedding_layers=False"),
    "a quantized head in 8 bits": (quantized_head("SCB"), "quantized weights that lm_head was trained on", ""),
    **{
        f"unknown {key}": (added(key), re.escape(key), "")
        for key in (
            f"{KEY}.lora_magnitude_vector", f"{KEY}.lora_B.bias", f"{KEY}.bias", f"{KEY}.lora_embedding_A",
            "base_model.model.lm_head.weight", f"{KEY}.lora_A.default.weight", f"{MODULE}.lora_A.weight",
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            f"prefix.{KEY}.lora_A.weight", f"{KEY}.lora_C.weight", "stray",
        )
    },
}  # fmt: skip
"""A change of the tensors, and words of the error and the hint."""


@pytest.mark.parametrize("name", DAMAGED)
def test_tensors_that_are_incomplete_invalid_or_unknown_are_refused_by_name(changed, name):
    change, error, hint = DAMAGED[name]
    edit(changed, change)
    with pytest.raises(AdapterError, match=error) as caught:
        read_adapter(changed)
    assert hint in caught.value.hint


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_a_scaling_that_is_not_finite_is_refused(changed, alpha):
    configure(changed, lora_alpha=alpha)
    with pytest.raises(UnsafeInputError, match=r"adapter_config\.json"):
        read_adapter(changed)
    text = (changed / "adapter_config.json").read_text()
    (changed / "adapter_config.json").write_text(text.replace("-Infinity", "-1e999").replace("Infinity", "1e999"))
    with pytest.raises(UnsafeInputError, match=r"adapter_config\.json"):
        read_adapter(changed)


def test_a_file_that_is_no_safetensors_file_is_refused_and_not_loaded(changed):
    torch.save({}, changed / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        read_adapter(changed)


def as_pickle(tensors, folder):
    """Also with tensors that share memory, as a trained embedding and a tied head do, or are not contiguous."""
    table = torch.ones(8, 4)
    shared = {f"base_model.model.{name}.weight": table for name in ("model.embed_tokens", "lm_head")}
    torch.save({name: t.T.contiguous().T for name, t in tensors.items()} | shared, folder / "adapter_model.bin")
    return tensors | shared


def in_shards(tensors, folder):
    for number, part in enumerate((dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])), 1):
        save_file(part, folder / f"adapter_model-0000{number}-of-00002.safetensors")
    return tensors


@pytest.mark.parametrize(
    ("write", "error"), [(as_pickle, r"pickled adapter_model\.bin is not loaded"), (in_shards, "only shards")]
)
def test_the_hinted_command_converts_a_pickle_or_shards(changed, write, error):
    file = changed / "adapter_model.safetensors"
    expected = write(load_file(file), changed)
    file.unlink()
    with pytest.raises(AdapterError, match=error) as caught:
        read_adapter(changed)
    python, *rest = shlex.split(caught.value.hint.removeprefix("in that folder, run "))
    assert python == "python"
    subprocess.run([sys.executable, *rest], cwd=changed, check=True)
    found = load_file(file)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


HALF = {"lora_unet_blocks_0_q_proj.lora_down.weight": torch.ones(2, 4)}


@pytest.mark.parametrize(
    ("file", "writer"), [("pytorch_lora_weights.bin", "diffusers"), ("style.safetensors", "kohya"), ("other", "")]
)
def test_an_adapter_in_a_different_format_is_refused_with_the_name_of_its_writer(tmp_path, file, writer):
    if writer == "kohya":
        save_file(HALF, tmp_path / file)
    else:
        (tmp_path / file).write_bytes(b"a pickle, or not")
    named = f": .* {file} is in the format of {writer}" if writer else r": adapter_config\.json not found"
    with pytest.raises(AdapterError, match=f"(?m)not an adapter{named}$") as caught:
        read_adapter(tmp_path)
    assert ("as peft saves it" in caught.value.hint) == bool(writer)


def test_adapters_in_subfolders_are_named_in_the_hint(changed, tmp_path):
    """TRL saves ``train`` and ``reference`` like this, and trainers their checkpoints."""
    outer = tmp_path / "outer"
    for name in ("train", "reference"):
        shutil.copytree(changed, outer / name)
    with pytest.raises(AdapterError, match="not an adapter") as caught:
        read_adapter(outer)
    assert caught.value.hint == "pass a folder inside it: reference, train"


def test_kohya_keys_are_refused_with_a_hint_to_rename_them_which_works(changed):
    before = read_adapter(changed)

    def renamed(tensors, *pairs):
        for key in list(tensors):
            name = key
            for old, new in pairs:
                name = name.replace(old, new)
            tensors[name] = tensors.pop(key)

    def to_kohya(tensors):
        renamed(tensors, ("lora_A", "lora_down"), ("lora_B", "lora_up"))
        tensors[f"{KEY}.alpha"] = torch.tensor(8.0)

    edit(changed, to_kohya)
    with pytest.raises(AdapterError, match=r"lora_(down|up)\.weight' is named as in the format of kohya") as caught:
        read_adapter(changed)
    assert "rename lora_down to lora_A and lora_up to lora_B" in caught.value.hint
    edit(changed, lambda tensors: (renamed(tensors, ("lora_down", "lora_A"), ("lora_up", "lora_B")),
                                   tensors.pop(f"{KEY}.alpha")))  # fmt: skip
    assert read_adapter(changed).digests == before.digests


@pytest.mark.parametrize(
    "name",
    ["non_lora_trainables.bin", "non_lora_state_dict.bin", "trainable_params.bin", "vit.safetensors",
     "scoring_head.safetensors", "joint_head.safetensors"],
)  # fmt: skip
def test_further_trained_weights_in_the_folder_are_refused(changed, name):
    (changed / name).write_bytes(b"a pickle, or not")
    with pytest.raises(AdapterError, match=f"{name} contains further trained weights"):
        read_adapter(changed)


def test_a_value_head_in_the_folder_is_ignored(changed):
    shutil.copy(changed / "adapter_model.safetensors", changed / "value_head.safetensors")
    assert len(read_adapter(changed).modules) == 14


def test_an_mlx_adapter_is_recognized_and_refused(changed):
    config = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0}}
    (changed / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"an MLX adapter: adapter_config\.json has no peft_type") as caught:
        read_adapter(changed)
    assert "LORA" not in caught.value.hint
    assert f"mlx_lm.fuse --model BASE --adapter-path {changed}" in caught.value.hint
    assert "lora_magnitude_vector" not in caught.value.hint
    assert "use_dora" in mlx_hint(changed, config | {"fine_tune_type": "dora"})
    of_peft = {"peft_type": "IA3", "lora_parameters": {"rank": 8}}
    (changed / "adapter_config.json").write_text(json.dumps(of_peft))
    assert mlx_hint(changed, of_peft) == ""
    with pytest.raises(AdapterError, match="unsupported kind of adapter: IA3"):
        read_adapter(changed)
    (changed / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"(?m)not a peft adapter: adapter_config\.json has no peft_type$"):
        read_adapter(changed)


def test_folders_that_are_not_adapters_are_refused(tmp_path, llama, changed):
    with pytest.raises(AdapterError, match="not an adapter"):
        read_adapter(llama)
    with pytest.raises(UsageError, match="does not exist"):
        read_adapter(tmp_path / "absent")
    (changed / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors not found"):
        read_adapter(changed)
    save_file({}, changed / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="contains no tensors"):
        read_adapter(changed)


def low_rank(out, rank, into, scaling, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) * 0.05 for shape in ((rank, into), (out, rank)))
    return LowRank.of_tensors(a, b, scaling)


def written(folder, modules, base=""):
    with Output(folder, ["adapter"]) as output:
        write_adapter(output, modules, base)
        output.publish(Manifest("adapter", {"name": "test"}, tuple(output.files), tuple(output.tensors)))
    return folder


def test_a_written_adapter_is_read_back_and_peft_computes_the_same_scalings(tmp_path, llama):
    modules = {
        "model.layers.0.self_attn.q_proj": low_rank(64, 4, 64, 2.0, 1),
        "model.layers.1.self_attn.q_proj": low_rank(64, 2, 64, 1.0, 2),
        "model.layers.0.mlp.down_proj": low_rank(64, 4, 128, 0.25, 3),
        "model.layers.1.mlp.down_proj": low_rank(64, 4, 128, 2.0, 4),
    }
    folder = written(tmp_path / "a", modules, str(llama))
    read = read_adapter(folder)
    assert set(read.modules) == set(modules)
    for name, term in modules.items():
        assert torch.equal(read.modules[name].lora_a, term.lora_a)
        assert torch.equal(read.modules[name].lora_b, term.lora_b)
        assert read.modules[name].scaling == term.scaling
    assert scalings_of_peft(folder, llama) == {name: term.scaling for name, term in modules.items()}
    assert read.manifest is not None


def test_written_bytes_do_not_depend_on_the_order_of_modules(tmp_path):
    modules = {f"model.layers.{n}.mlp.up_proj": low_rank(64, 2 + n % 2, 64, 1.5, n) for n in range(4)}
    one = written(tmp_path / "one", modules)
    two = written(tmp_path / "two", dict(reversed(modules.items())))
    weights = "adapter_model.safetensors"
    assert (one / weights).read_bytes() == (two / weights).read_bytes()
    assert (one / "adapter_config.json").read_bytes() == (two / "adapter_config.json").read_bytes()


def test_an_adapter_that_changes_while_it_is_read_is_refused(adapter, copy_of, monkeypatch):
    folder = copy_of(adapter)
    take_all = adapter_module.Parts.take_all

    def late(*arguments):
        os.utime(folder / "adapter_model.safetensors", ns=(1, 1))
        return take_all(*arguments)

    monkeypatch.setattr(adapter_module.Parts, "take_all", late)
    with pytest.raises(IntegrityError, match="changed while it was read"):
        read_adapter(folder)


@pytest.fixture
def complete(tmp_path):
    """An adapter with its initial value in a compensation file, and a manifest that lists all files."""
    term = LowRank.of_tensors(torch.ones(2, 8), torch.ones(6, 2), 0.5)
    with Output(tmp_path / "written", "plan") as out:
        write_adapter(out, {MODULE: term}, "base")
        write_compensation(out, {MODULE: term})
        out.publish(Manifest("adapter", {"name": "train"}, tuple(out.files), tuple(out.tensors)))
    return tmp_path / "written"


@pytest.mark.parametrize("name", ["adapter_config.json", COMPENSATION_NAME])
def test_config_and_compensation_files_that_differ_from_the_manifest_are_refused(complete, name):
    """Otherwise an artifact made from the adapter would record a parent that never existed."""
    assert read_adapter(complete).compensation
    if name == COMPENSATION_NAME:
        tensors = load_file(complete / name)
        save_file({key: tensor * 2 for key, tensor in tensors.items()}, complete / name)
    else:
        configure(complete, lora_alpha=999)
    with pytest.raises(IntegrityError, match=f"{name} (changed|has)") as caught:
        read_adapter(complete)
    assert MANIFEST_NAME in caught.value.hint
    assert read_adapter(complete, changed=True).manifest_mismatch().startswith(name)
    (complete / MANIFEST_NAME).unlink()
    assert read_adapter(complete).manifest is None


def test_files_that_a_manifest_does_not_list_are_not_compared_with_it(complete):
    edit_manifest(complete, files=())
    configure(complete, lora_alpha=999)
    assert read_adapter(complete).modules[MODULE].scaling == 999 / 2
