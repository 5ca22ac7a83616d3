"""Layers that ``*`` leaves out are reported, and a run is resumed only with the layers it was started with."""

from dataclasses import replace

import pytest
import tiny

from adaptkit.errors import ConflictError, UsageError
from adaptkit.operations.check import check
from adaptkit.training import run
from adaptkit.training.config import TrainConfig
from adaptkit.training.dry_run import plan_run
from adaptkit.training.loop import train


@pytest.fixture(scope="module")
def bases(made):
    def write(name):
        folder = made / f"targets-{name}"
        return folder if folder.exists() else tiny.write_architecture(folder, name)

    return write


def config(base, instructions, **values):
    usual = {"steps": 2, "rank": 1, "max_length": 64, "device": "cpu", "batch_size": 2}
    return TrainConfig(base=str(base), data=(str(instructions),), **usual | values)


ROUTERS = "no adapter, unless targeted by name, for 2 routers: model.layers.0.mlp.shared_expert_gate, "
STACKS = (
    "no adapter, without target_parameters, for 4 stacks of expert matrices: model.layers.0.mlp.experts.down_proj, "
)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("qwen2_moe", {}, ROUTERS),
        ("qwen2_moe", {"exclude": ("q_proj",)}, ROUTERS),
        ("qwen2_moe", {"targets": ("*", "shared_expert_gate")}, STACKS),
        ("qwen2_moe", {"exclude": ("shared_expert_gate",)}, STACKS),
        ("qwen2_moe", {"exclude": ("shared_expert_gate",), "target_parameters": ("*.experts.*",)}, ""),
        ("qwen2_moe", {"targets": ("q_proj",)}, ""),
        (
            "qwen2_moe",
            {"exclude": ("shared_expert_gate",), "modules_to_save": ("experts",), "compute_dtype": "bfloat16"},
            "",
        ),
        ("qwen3_5_text", {}, ""),
        ("gemma3", {}, "no adapter, unless targeted by name, for 14 layers outside the language model: model."),
        (
            "mamba",
            {},
            "no adapter, unless targeted by name, for 2 layers that peft rejects and 2 layers whose adapter peft "
            "ignores: backbone.layers.0.mixer.",
        ),
        (
            "mamba",
            {"targets": ("*", "out_proj")},
            "no adapter, unless targeted by name, for 2 layers whose adapter peft ignores: backbone.layers.0.",
        ),
        ("mamba", {"targets": ("*", "out_proj", "dt_proj")}, ""),
        ("bloom", {"modules_to_save": ("dense",)}, ""),
        ("bloom", {"targets": ("dense",)}, ""),
    ],
)
def test_layers_that_get_no_adapter_are_reported(name, values, said, bases, instructions, tmp_path):
    notes = []
    settings = config(bases(name), instructions, **values)
    told = plan_run(settings, tmp_path / "adapter").left_out
    assert told.startswith(said) if said else told == ""
    train(settings, tmp_path / "adapter", note=notes.append)
    about = [note for note in notes if "no adapter" in note]
    assert about == ([told] if said else [])


def test_indexers_of_sparse_attention_are_left_out(instructions, tmp_path, monkeypatch):
    values = {
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
    }  # fmt: skip
    monkeypatch.setitem(tiny.ARCHITECTURES, "glm_moe_dsa", values)
    base, notes = tiny.write_architecture(tmp_path / "base", "glm_moe_dsa"), []
    train(config(base, instructions), tmp_path / "adapter", note=notes.append)
    said = "for 6 layers of indexers (no gradient reaches them): model.layers.0.self_attn.indexer."
    assert any(said in note for note in notes)
    assert not any("never received a gradient" in note for note in notes)


def test_convolution_filters_are_not_stacks_of_experts(bases, instructions, tmp_path):
    with pytest.raises(UsageError, match=r"'\*' matches no stacked expert matrix"):
        plan_run(config(bases("mamba"), instructions, target_parameters=("*",)), tmp_path / "adapter")


def test_adapters_that_get_no_gradient_from_text_are_reported(bases, instructions, tmp_path):
    notes = []
    train(config(bases("gemma3"), instructions, targets=("q_proj",)), tmp_path / "adapter", note=notes.append)
    idle = [note for note in notes if "never received a gradient" in note]
    assert len(idle) == 1
    assert idle[0].startswith("2 adapters")
    assert "vision" in idle[0]


def test_a_run_that_was_started_with_other_layers_is_not_resumed(bases, instructions, tmp_path, monkeypatch):
    """For example, if an older version started it, in which ``*`` matched more layers."""
    settings = config(bases("qwen2_moe"), instructions, steps=3, save_every=1)

    class Stop(Exception):  # noqa: N818
        pass

    def stop(report):
        raise Stop

    build = run.build

    def older(inputs, *others):
        return build(replace(inputs, config=replace(inputs.config, targets=("*", "shared_expert_gate"))), *others)

    monkeypatch.setattr(run, "build", older)
    with pytest.raises(Stop):
        train(settings, tmp_path / "adapter", on_step=stop)
    monkeypatch.undo()
    with pytest.raises(ConflictError, match=r"trains \d+ parameters, but this one trains \d+") as caught:
        train(settings, tmp_path / "adapter")
    assert caught.value.hint == "resume with the version that started it, or start over with --force"


@pytest.mark.parametrize("targets", [("*",), ("*", "out_proj")])
def test_peft_loads_an_adapter_on_the_default_targets_of_mamba_and_refuses_others(
    targets, bases, instructions, tmp_path
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, out = bases("mamba"), tmp_path / "adapter"
    train(config(base, instructions, targets=targets), out, note=lambda line: None)
    verdict = check(out, ["peft"], base=base).verdicts[0]
    assert verdict.taken == (targets == ("*",))
    model = AutoModelForCausalLM.from_pretrained(base)
    if verdict.taken:
        PeftModel.from_pretrained(model, out)
    else:
        assert "backbone.layers.0.mixer.out_proj and 1 more" in verdict.findings[0].found
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            PeftModel.from_pretrained(model, out)
