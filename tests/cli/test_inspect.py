"""``adaptkit inspect`` as a process: the table is short, the JSON document is complete."""

import json

import peft_adapters
import pytest
from folders import flip

from adaptkit.operations.quantize import QuantizeOptions, quantize


@pytest.fixture(scope="module")
def folder(made):
    return peft_adapters.make(made, "everything").adapter


def table(done):
    """Label -> value of each line."""
    return {line[:25].strip(): line[25:].strip() for line in done.stdout.splitlines()}


def test_the_table_of_an_adapter_with_every_feature_is_short(run_cli, folder):
    done = run_cli("inspect", folder)
    assert (done.code, done.stderr) == (0, "")
    rows = table(done)
    assert rows["kind"] == "adapter"
    assert rows["rslora"] == "yes"
    assert rows["dora magnitudes"] == "14"
    assert rows["ranks"] == "2 (2), 4 (12)"
    assert rows["replaced rows"] == "3 of model.embed_tokens"
    assert "norm.weight (1)" in rows["replaced tensors"]
    assert "expert stacks" not in rows
    assert len(rows) < 20


def test_the_document_has_what_the_table_omits(run_cli, folder):
    details = json.loads(run_cli("inspect", folder, "--json").stdout)["details"]
    assert details["expert_stacks"] is None
    assert details["replaced_rows"] == {"model.embed_tokens": 3}
    assert details["rslora"] is True


def test_an_adapter_that_was_changed_after_its_manifest_was_written_is_shown_as_such(run_cli, folder, tmp_path):
    made = tmp_path / "made"
    assert run_cli("adopt", folder, "-o", made).code == 0
    assert "unlike manifest" not in table(run_cli("inspect", made))
    config = json.loads((made / "adapter_config.json").read_text())
    (made / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "another"}))
    assert table(run_cli("inspect", made))["unlike manifest"].startswith("adapter_config.json has ")
    details = json.loads(run_cli("inspect", made, "--json").stdout)["details"]
    assert details["unlike_manifest"].startswith("adapter_config.json has ")
    flip(made / "adapter_model.safetensors", -1)
    assert table(run_cli("inspect", made))["unlike manifest"] == "its tensors"


def test_an_unsupported_adapter_is_refused_with_one_error_and_one_hint(run_cli, llama, tmp_path):
    error, hint = run_cli("inspect", peft_adapters.write_refused(tmp_path / "ia3", "IA3", llama)).refusal(5)
    assert "IA3" in error
    assert "LORA" in hint


def test_an_unfinished_output_is_refused_as_such_until_it_is_finished(run_cli, llama_sharded, adapter, tmp_path):
    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    folder, writing = tmp_path / "out.partial", ["quantize", llama_sharded, "-o", tmp_path / "out"]
    with pytest.raises(KeyboardInterrupt):
        quantize(llama_sharded, tmp_path / "out", QuantizeOptions(max_shard_bytes=20_000), progress=interrupt)
    for command in (
        ["inspect", folder],
        ["verify", folder],
        ["check", folder, "--target", "vllm"],
        ["dequantize", folder, "-o", tmp_path / "plain"],
        ["publish", folder, "me/model"],
    ):
        error, hint = run_cli(*command).refusal(2)
        assert error == f"error: {folder}: is an unfinished output"
        assert "run the same command again to resume" in hint
    assert run_cli(*writing, "--max-shard-size", "20000B").code == 0
    assert run_cli("inspect", tmp_path / "out").code == 0
