"""``adopt`` on the command line: its output, its exit codes, and what can be done with the result."""

import json
import re
import shutil


def rows(text):
    """First column -> second, of a table without continuation lines."""
    return dict(re.split("  +", line, maxsplit=1) for line in text.splitlines())


def test_the_output_lists_copied_files_and_the_recorded_base(run_cli, llama, adapter, tmp_path):
    source = tmp_path / "lora"
    shutil.copytree(adapter, source)
    (source / "optimizer.pt").write_bytes(b"x")
    done = run_cli("adopt", source, "-o", "ours", "--base", llama, cwd=tmp_path)
    assert (done.code, done.stderr) == (0, "")
    told = rows(done.stdout)
    size = sum(path.stat().st_size for path in adapter.iterdir()) / 1000
    assert told["wrote"] == f"ours (adapter, 2 files, {size:.1f} kB)"
    assert told["base"] == f"{llama}: fingerprints of 14 changed tensors recorded, so another base will be rejected"
    assert told["not copied"] == "optimizer.pt"
    report = json.loads(run_cli("adopt", source, "-o", "again", "--base", llama, "--json", cwd=tmp_path).stdout)
    assert report["manifest_sha256"] == told["manifest sha256"]
    assert report["base_fingerprints"] == 14
    unknown = rows(run_cli("adopt", source, "-o", "baseless", "--dry-run", cwd=tmp_path).stdout)
    assert "--base" in unknown["base"]
    assert "manifest sha256" not in unknown
    assert not (tmp_path / "baseless").exists()


def test_for_an_artifact_without_a_manifest_the_hint_is_an_adopt_command_that_works(run_cli, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "lora")
    for command in (["publish", "lora", "me/lora"], ["verify", "lora"]):
        done = run_cli(*command, cwd=tmp_path)
        assert done.code == 3
        hint = done.stderr.splitlines()[1].partition("adaptkit ")[2]
        assert hint == "adopt lora -o OUT"
    assert run_cli(*hint.replace("OUT", "ours").split(), cwd=tmp_path).code == 0
    assert run_cli("verify", "ours", cwd=tmp_path).code == 0


def test_training_starts_from_an_adopted_adapter_only_on_its_base(
    run_cli, llama, llama_sharded, adapter, instructions, tmp_path
):
    """The first two bases have the same weights; the third differs from them in one tensor."""
    assert run_cli("adopt", adapter, "-o", tmp_path / "ours", "--base", llama).code == 0
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama, tmp_path / "other")
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].neg_()
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    codes = {}
    for name, base in (("same", llama_sharded), ("other", tmp_path / "other")):
        assert run_cli("quantize", base, "-o", tmp_path / f"{name}-nf4").code == 0
        done = run_cli(
            "train", "--base", tmp_path / f"{name}-nf4", "--data", instructions, "-o", tmp_path / f"{name}-out",
            "--init", tmp_path / "ours", "--steps", 1, "--batch-size", 1, "--dry-run",
        )  # fmt: skip
        codes[name] = done.code
    assert codes == {"same": 0, "other": 4}
