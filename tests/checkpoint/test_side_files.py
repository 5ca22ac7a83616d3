"""Side files are those that belong to a checkpoint, and are no links to anything else."""

import os

import pytest

from adaptkit.checkpoint.side_files import check_side_files, find_side_files, side_files
from adaptkit.errors import CheckpointError, UnsafeInputError


def test_side_files_are_the_files_that_outputs_copy_and_no_others(tmp_path):
    travels = ["LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.json"]
    travels += ["spiece.model", "vocab.tiktoken", "NOTICE", "LICENSE-MODEL", "LICENCE.md", "USE_POLICY.md"]
    stays = ["config.json", "model.safetensors", "model.safetensors.index.json", "adaptkit-manifest.json", ".env"]
    stays += ["pytorch_model.bin", "optimizer.json", "trainer_state.json", "modeling_x.py", "adapter_config.json"]
    stays += [".hidden.json", "pytorch_model.bin.index.json", "training_args.bin"]
    for name in travels + stays:
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder.json").mkdir()
    assert side_files(tmp_path) == {name: tmp_path / name for name in travels}
    assert list(side_files(tmp_path)) == sorted(travels)
    os.mkfifo(tmp_path / "pipe.json")
    assert list(find_side_files(tmp_path)) == sorted(travels)
    assert list(side_files(tmp_path, lambda name: name in travels)) == sorted(travels)
    with pytest.raises(CheckpointError, match=r"pipe\.json: not a regular file"):
        side_files(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_code_is_a_side_file_only_if_a_configuration_refers_to_it(tmp_path, name):
    for file in ("modeling_x.py", "configuration_x.py", "helpers.py"):
        (tmp_path / file).write_text("raise RuntimeError('run')")
    (tmp_path / "deeper.py").mkdir()
    (tmp_path / name).write_text('{"auto_mapping": {}}')
    assert [file for file in side_files(tmp_path) if file.endswith(".py")] == []
    (tmp_path / name).write_text('{"auto_map": {"AutoModel": "modeling_x.Model"}}')
    code = [file for file in side_files(tmp_path) if file.endswith(".py")]
    assert code == ["configuration_x.py", "helpers.py", "modeling_x.py"]


def test_additional_chat_templates_are_side_files_in_their_folder(tmp_path):
    for name in ("additional_chat_templates/tool_use.jinja", "additional_chat_templates/x.txt", "more/y.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{{ messages }}")
    found = side_files(tmp_path)
    assert found == {found_name: tmp_path / found_name for found_name in ["additional_chat_templates/tool_use.jinja"]}
    (tmp_path / "additional_chat_templates" / "lost.jinja").symlink_to("gone.jinja")
    with pytest.raises(CheckpointError, match=r"lost\.jinja: No such file"):
        side_files(tmp_path)


@pytest.mark.parametrize("names", [("LICENSE.txt", "license.txt"), ("Config.json",), ("a.json", "A.json")])
def test_side_files_whose_names_differ_only_in_case_are_refused(tmp_path, names):
    (tmp_path / "config.json").write_text("{}")
    check_side_files(tmp_path)
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="differ only in case"):
        check_side_files(tmp_path)


def test_side_files_may_be_links_to_the_same_files_of_another_checkpoint(llama, tmp_path):
    for path in llama.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert list(side_files(tmp_path)) == list(side_files(llama))
    check_side_files(tmp_path)
    (tmp_path / "LICENSE").symlink_to(llama / "tokenizer.json")
    with pytest.raises(UnsafeInputError, match=r"LICENSE: leads to .*tokenizer\.json, outside its folder"):
        side_files(tmp_path)


def test_side_files_are_never_links_out_of_the_folder_except_into_the_hubs_cache(tmp_path):
    cache, secret = tmp_path / "models--org--name", tmp_path / "secret"
    snapshot, copied = cache / "snapshots" / ("0" * 40), tmp_path / "copied"
    for folder in (snapshot, copied, cache / "blobs"):
        folder.mkdir(parents=True)
    secret.write_bytes(b"nobody's business")
    for name in ("1" * 40, "2" * 64, "an etag of a mirror"):
        (cache / "blobs" / name).write_bytes(b"x")
        (snapshot / f"{name[:2]}.txt").symlink_to(f"../../blobs/{name}")
    (copied / "large.json").symlink_to(cache / "blobs" / ("2" * 64))  # as older clients link into --local-dir
    (copied / "within.txt").symlink_to("large.json")
    annexed = tmp_path / f"SHA256E-s1--{'3' * 64}.json"
    annexed.write_bytes(b"x")
    (copied / "annexed.json").symlink_to(annexed)
    assert list(side_files(snapshot)) == ["11.txt", "22.txt", "an.txt"]
    assert list(side_files(copied)) == ["annexed.json", "large.json", "within.txt"]
    (copied / "LICENSE").symlink_to("../secret")
    (tmp_path / "alias").symlink_to(copied)
    (snapshot / "LICENSE").symlink_to(secret)
    for folder in (copied, tmp_path / "alias", snapshot):
        with pytest.raises(UnsafeInputError, match=r"LICENSE: leads to .*/secret, outside its folder"):
            side_files(folder)
        assert folder / "LICENSE" == find_side_files(folder)["LICENSE"]  # to be read, but not copied
    for name in ("4" * 40 + ".pem", f"key-s1--{'5' * 64}"):
        secret.rename(tmp_path / name)
        secret = tmp_path / name
        (copied / "LICENSE").unlink()
        (copied / "LICENSE").symlink_to(secret)
        with pytest.raises(UnsafeInputError, match="outside its folder"):
            side_files(copied)
