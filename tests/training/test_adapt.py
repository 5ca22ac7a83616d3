"""Everything that an adapter can be: peft, the merge and a second run read it as the model that was trained."""

from dataclasses import dataclass, field

import peft_adapters
import pytest
import tiny
import torch

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.architecture import load_tokenizer
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import read_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.operations.dequantize import DequantizeOptions, dequantize
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.loading import load_adapter
from adaptkit.training.model import load_model
from adaptkit.training.parameters import Trainable
from adaptkit.training.result import write_result
from adaptkit.training.start import begin, resolve_method

CPU = torch.device("cpu")
IDS = torch.arange(2, 298).view(8, 37)


@dataclass(frozen=True)
class Case:
    """An adapter's settings, and the base that it is for."""

    family: str = "tied"
    settings: dict = field(default_factory=dict)
    trained: str = ""
    """A word in the name of something that this case alone trains."""


CASES = {
    "rslora": Case(settings={"rslora": True, "alpha": 7.0, "targets": ("q_proj", "*.mlp.*"),
                             "exclude": ("down_proj",)}),
    "patterns": Case(settings={"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 3},
                               "alpha_pattern": {"v_proj": 5}}),
    "dora": Case(settings={"dora": True, "rslora": True, "rank_pattern": {"up_proj": 2}}, trained="magnitude"),
    "dora of Conv1D": Case("gpt2", {"dora": True}, "magnitude"),
    "all biases": Case("gpt2", {"bias": "all"}, "ln_1.bias"),
    "biases of adapted layers": Case("gpt2", {"bias": "lora_only", "targets": ("c_attn",)}, "c_attn.bias"),
    "a tied head": Case(settings={"modules_to_save": ("lm_head",)}, trained="embed_tokens"),
    "a head": Case("untied", {"modules_to_save": ("lm_head",)}, "lm_head"),
    "norms": Case(settings={"modules_to_save": ("norm",), "targets": ("q_proj",)}, trained="norm"),
    "a norm with a bias": Case("gpt2", {"modules_to_save": ("ln_f",)}, "ln_f.bias"),
    "tokens of a tied vocabulary": Case(settings={"trainable_tokens": ("<|im_end|>", "7", "40")}, trained="rows"),
    "tokens": Case("untied", {"trainable_tokens": ("<|im_end|>", "7", "40")}, "rows"),
    "experts": Case("moe", {"target_parameters": ("*.experts.*",), "targets": ("q_proj",)}, "changes"),
    "some experts": Case("moe", {"target_parameters": ("down_proj",), "targets": ()}, "changes.down_proj"),
    "all of it": Case(
        "untied",
        {"dora": True, "trainable_tokens": ("7",), "modules_to_save": ("norm", "lm_head"),
         "rank_pattern": {"q_proj": 1}},
        "magnitude",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By family: plain in float32, quantized, and that dequantized in float32."""
    root = tmp_path_factory.mktemp("bases")
    tiny.write_llama(root / "tied", dtype="float32")
    tiny.write_llama(root / "untied", dtype="float32", tied=False, shards=2)
    tiny.write_gpt2(root / "gpt2")
    tiny.write_family(root / "moe", "qwen3_moe", dtype="float32")
    for name in ("tied", "untied", "gpt2", "moe"):
        quantize(root / name, root / f"{name}-nf4", QuantizeOptions(moe="quantize"))
        dequantize(root / f"{name}-nf4", root / f"{name}-again", DequantizeOptions(dtype="float32"))
    return root


def begun(base, settings, noise=0.05):
    """A model at the beginning of a run, then with random values in everything that is trained."""
    config = TrainConfig(base=str(base), data=("none",), **{"rank": 4, "compute_dtype": "float32"} | settings)
    config = resolve_method(config, Checkpoint(base))
    model = load_model(base, torch.float32, CPU)
    begin(model, config, None, load_tokenizer(base))
    trainable = Trainable.of(model, config.lora_plus_ratio)
    generator = torch.Generator().manual_seed(7)
    trainable.values.add_(torch.randn(trainable.values.shape, generator=generator), alpha=noise)
    return model, config


def written(folder, model, config, base):
    with Output(folder, "plan") as out:
        out.publish(write_result(out, model, config, read_manifest(base), None, []))
    return folder


def logits(network):
    with torch.no_grad():
        return network(IDS).logits


def by_peft(base, adapter):
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    with peft_adapters.quiet():
        model = PeftModel.from_pretrained(peft_adapters.load_float32(base), adapter).eval()
        loaded = set_peft_model_state_dict(model, load_peft_weights(str(adapter), device="cpu"))
    assert loaded.unexpected_keys == []
    missing = [key for key in loaded.missing_keys if ".default" in key]
    assert missing in ([], ["base_model.model.lm_head.token_adapter.trainable_tokens_delta.default"])  # tied
    return logits(model)


@pytest.mark.parametrize("name", CASES)
def test_peft_gives_the_logits_of_the_trained_model(bases, name, tmp_path):
    case, base = CASES[name], bases / f"{CASES[name].family}-nf4"
    model, config = begun(base, case.settings)
    assert any(case.trained in n for n, p in model.network.named_parameters() if p.requires_grad)
    adapter = written(tmp_path / "adapter", model, config, base)
    expected = logits(model.network)
    found = by_peft(bases / f"{case.family}-again", adapter)
    assert float((found - expected).abs().max()) < 2e-5
    plain = logits(load_model(base, torch.float32, CPU).network)
    assert float((plain - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_loading_and_merging_give_the_logits_of_the_trained_model(bases, name, tmp_path):
    case, base = CASES[name], bases / CASES[name].family
    model, config = begun(base, case.settings)
    assert config.method == "lora"
    adapter = written(tmp_path / "adapter", model, config, base)
    expected = logits(model.network)
    again = load_model(base, torch.float32, CPU)
    load_adapter(again, read_adapter(adapter))
    assert torch.equal(logits(again.network), expected)
    assert {n for n, p in again.network.named_parameters() if p.requires_grad} == {
        n for n, p in model.network.named_parameters() if p.requires_grad
    }
    merge(base, [adapter], tmp_path / "merged")
    merged = logits(load_model(tmp_path / "merged", torch.float32, CPU).network)
    assert float((merged - expected).abs().max()) < 2e-5
