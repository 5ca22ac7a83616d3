"""The type that a run computes in: bfloat16 only where it is fast, and said in the report and the manifest."""

import json
import platform

import pytest
import torch

from adaptkit.training.device import attention_of_any_length, choose_dtype

CPU = torch.device("cpu")


def test_a_type_that_is_asked_for_is_taken():
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert choose_dtype("float32", CPU) == torch.float32


@pytest.mark.skipif(platform.machine() != "x86_64", reason="says what x86 processors have")
def test_processors_without_avx512_compute_in_float32():
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if has_avx512 else torch.float32)


@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float32"])
def test_the_report_and_the_manifest_name_the_type_and_not_auto(llama_nf4, instructions, tmp_path, run_cli, asked):
    out = tmp_path / "out"
    arguments = ["--steps", 1, "--batch-size", 1, "--rank", 2, "--device", "cpu", "--compute-dtype", asked, "--json"]
    done = run_cli("train", "--base", llama_nf4, "--data", instructions, "-o", out, *arguments)
    assert done.code == 0, done.stderr
    expected = str(choose_dtype(asked, CPU)).removeprefix("torch.")
    assert json.loads(done.stdout)["compute_dtype"] == expected
    assert json.loads((out / "adaptkit-manifest.json").read_text())["operation"]["options"]["compute_dtype"] == expected
    found = run_cli(
        "evaluate", "--base", llama_nf4, "--data", instructions, "--device", "cpu", "--compute-dtype", asked
    )
    assert f"computed in  {expected}\n" in found.stdout


def test_attention_of_any_length_leaves_torch_as_it_was():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with attention_of_any_length():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
