"""``adaptkit check`` as a process: exit codes, the table, the JSON document."""

import json
import shutil

import pytest
import tiny

TARGETS = ["gguf", "peft", "sglang", "vllm"]


@pytest.fixture(scope="module")
def rslora(tmp_path_factory, llama):
    folder = tmp_path_factory.mktemp("check") / "rslora"
    return tiny.write_peft_adapter(folder, llama, target_modules=["q_proj", "v_proj"], use_rslora=True)


def test_the_exit_code_is_the_verdict(run_cli, rslora, llama):
    assert run_cli("check", rslora).code == 1
    assert run_cli("check", rslora, "--target", "vllm", "--target", "peft").code == 0
    done = run_cli("check", llama, "--quiet")
    assert (done.code, done.stdout, done.stderr) == (0, "", "")


def test_the_table_lists_each_finding_with_its_effect_and_a_remedy(run_cli, rslora):
    done = run_cli("check", rslora, "--target", "sglang")
    assert done.stderr == ""
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert any(line.startswith("sglang") and "does not load it correctly" in line for line in lines)
    assert any(line.startswith("error") and "use_rslora in adapter_config.json" in line for line in lines)
    assert f"-> run adaptkit resize {rslora} -o OUT --rank 4, which changes only lora_alpha" in lines
    assert any("--base" in line for line in lines)


def test_the_document_has_every_target(run_cli, rslora, llama):
    done = run_cli("check", rslora, "--base", llama, "--json")
    report = json.loads(done.stdout)
    assert done.code == 1
    assert [verdict["target"] for verdict in report["verdicts"]] == TARGETS
    assert (report["kind"], report["taken"]) == ("adapter", False)
    finding = report["verdicts"][TARGETS.index("sglang")]["findings"][0]
    assert set(finding) == {"level", "found", "effect", "change"}
    assert not any("--base" in text for text in report["unknown"])


def test_bad_requests_fail_with_one_line_and_the_documented_exit_code(run_cli, llama, rslora, tmp_path):
    broken = shutil.copytree(rslora, tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for arguments, code, phrase in (
        (["check", tmp_path / "absent"], 2, "does not exist"),
        (["check", llama, "--target", "tgi"], 2, "tgi"),
        (["check", rslora, "--base", tmp_path], 5, "not a checkpoint"),
        (["check", broken], 5, "not a readable safetensors file"),
    ):
        error, _ = run_cli(*arguments).refusal(code)
        assert phrase in error
