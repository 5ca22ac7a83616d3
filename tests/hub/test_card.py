"""Model cards: they state facts of the manifest, are reproducible, and carry over the base's licence."""

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import yaml
from local_hub import Fault, LocalHub
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adaptkit import adopt, quantize
from adaptkit.checkpoint.layout import read_json
from adaptkit.checkpoint.manifest import Manifest, require_manifest
from adaptkit.hub.card import CardFacts, base_model, make_card


@pytest.fixture
def manifest(artifact: Path) -> Manifest:
    return require_manifest(artifact)


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def facts_of(artifact: Path) -> CardFacts:
    config = read_json(artifact / "adapter_config.json")
    return CardFacts(config, base_model(config))


def test_an_adapters_card_names_its_base_and_hashes(manifest: Manifest, artifact: Path) -> None:
    card = make_card(manifest, facts_of(artifact))
    assert "AutoModelForCausalLM" in card
    assert front_matter(card) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["adaptkit", "lora"],
    }
    assert manifest.tensors_root in card
    assert "0" * 64 in card
    assert "| Modules | 2 |" in card
    assert "| Rank, alpha | 2, 4 |" in card


@pytest.mark.parametrize(
    ("kind", "operation", "relation", "tags"),
    [
        ("merged", "merge", "merge", ["adaptkit"]),
        ("quantized", "quantize", "quantized", ["adaptkit", "bitsandbytes"]),
        ("checkpoint", "train", "finetune", ["adaptkit"]),
        ("checkpoint", "dequantize", None, ["adaptkit"]),
    ],
)
def test_a_models_card_says_in_the_hubs_terms_how_it_relates_to_its_base(
    manifest: Manifest, kind: str, operation: str, relation: str | None, tags: list[str]
) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes"}} if kind == "quantized" else {}
    made = replace(manifest, kind=kind, operation={"name": operation})
    front = front_matter(make_card(made, CardFacts(config, "org/base")))
    assert (front["library_name"], front.get("base_model_relation"), front["tags"]) == ("transformers", relation, tags)
    assert not {"base_model", "base_model_relation"} & set(front_matter(make_card(made, CardFacts(config))))


@pytest.mark.parametrize(
    "name", ["/home/me/base", "./base", "../a", "~/base", "base", "a/b/c", "C:\\x", "a/b\nc", "", 5]
)
def test_local_paths_are_not_taken_as_names_of_base_models(name: Any) -> None:
    assert base_model({"base_model_name_or_path": name}) is None


def test_markup_in_an_option_stays_inside_its_code_block(manifest: Manifest) -> None:
    options = {"note": "``` | # heading\n---\n<script>", "key\n# heading": 1}
    card = make_card(replace(manifest, operation={"name": "train", "options": options}), CardFacts())
    lines = [line for line in card.splitlines() if "heading" in line or "script" in line]
    assert lines
    assert all(line.startswith("    ") for line in lines)


def test_no_value_can_leave_its_cell_or_become_markup(manifest: Manifest) -> None:
    hostile = "8\n\n# Title | <img src=x> \\[link](https://example.org)\u202e"
    parents = (replace(manifest.parents[0], kind="| <b> ![x](y)"),)
    card = make_card(replace(manifest, parents=parents), CardFacts({"r": hostile, "lora_alpha": 16}))
    shown = "8 # Title / &lt;img src=x> \\&#91;link](https://example.org)\\u202e"
    assert f"| Rank, alpha | {shown}, 16 |" in card.splitlines()
    (row,) = [line for line in card.splitlines() if "(y)" in line]
    assert row.count("|") == 5
    assert "| / &lt;b> !&#91;x](y) |" in row


BASE_CARD = """---
license: other
license_name: free-for-ducks
license_link: https://example.org/ducks
language: [en]
tags: [x]
---
# The base
"""


def publish_base(
    cli: Any, folder: Path, card: str = BASE_CARD, files: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Upload a base with a card to the Hub, as its authors would."""
    (folder / "base").mkdir()
    for name, text in {"README.md": card, **files}.items():
        (folder / "base" / name).write_text(text)
    code = "from huggingface_hub import HfApi; import json; api = HfApi(); api.create_repo('org/base');"
    cli(code=f"{code} print(json.dumps(api.upload_folder(repo_id='org/base', folder_path='base').oid and {{}}))")


def test_the_code_is_not_shown_if_the_base_is_multimodal(
    cli: Any, artifact: Path, hub: LocalHub, repository: Any, tmp_path: Path
) -> None:
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {}, "vision_config": {}}
    publish_base(cli, tmp_path, files={"config.json": json.dumps(config)})
    done = cli("publish", artifact, "me/model")
    assert done.code == 0, done.stdout
    card = card_on(hub, repository)
    assert "AutoModelForCausalLM" not in card
    assert "pipeline_tag" not in front_matter(card)
    assert front_matter(card)["base_model"] == "org/base"


def card_on(hub: LocalHub, repository: Any) -> str:
    return hub.store.blob(repository.files()["README.md"]).read_text()


def test_a_published_adapter_has_the_licence_of_its_base(
    cli: Any, artifact: Path, hub: LocalHub, repository: Any, tmp_path: Path
) -> None:
    publish_base(cli, tmp_path)
    done = cli("publish", artifact, "me/model")
    assert done.code == 0, done.stdout
    assert "note:" not in done.stderr
    card = card_on(hub, repository)
    assert front_matter(card)["license_name"] == "free-for-ducks"
    assert front_matter(card)["base_model"] == "org/base"
    assert "adaptkit verify FOLDER" in card


def test_an_unknown_base_is_noted_and_can_be_given_by_an_option(
    cli: Any, make_artifact: Callable[..., Path], hub: LocalHub, repository: Any, tmp_path: Path
) -> None:
    publish_base(cli, tmp_path)
    artifact = make_artifact(base="a-folder")
    silent = cli("publish", artifact, "me/model", "--dry-run")
    assert "--base-model" in silent.stderr
    done = cli("publish", artifact, "me/model", "--base-model", "org/base")
    assert done.code == 0
    assert "adapter_config.json calls the base 'a-folder', a name that peft may not find" in done.stderr
    front = front_matter(card_on(hub, repository))
    assert (front["base_model"], front["license"]) == ("org/base", "other")
    assert cli("publish", artifact, "me/model", "--base-model", "not a name").code == 2


def test_publishing_fails_rather_than_omit_the_licence_of_an_unreachable_base(
    cli: Any, artifact: Path, hub: LocalHub, repository: Any, tmp_path: Path
) -> None:
    publish_base(cli, tmp_path)
    hub.faults.append(Fault("*", "/org/base", "500", -1))
    assert cli("publish", artifact, "me/model").code == 7
    assert not repository.state or repository.files() == {}


def test_quantized_and_merged_models_are_published_and_pulled_with_cards(
    cli: Any, hub: LocalHub, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    for arguments, kind in (
        (("quantize", llama, "-o", "quantized"), "quantized"),
        (("merge", llama, adapter, "-o", "merged"), "merged"),
    ):
        assert cli(*arguments).code == 0
        done = cli("publish", kind, f"me/{kind}", "--check", "--base-model", "org/base")
        assert done.code == 0, done.stdout
        assert done.report["checked"]
        assert cli("pull", f"me/{kind}", "-o", f"{kind}-again").report["kind"] == kind
        front = front_matter((tmp_path / f"{kind}-again" / "README.md").read_text())
        assert front["base_model_relation"] == {"quantized": "quantized", "merged": "merge"}[kind]
    assert cli("unmerge", "merged-again", "-o", "restored", "--adapter", adapter).code == 0
    assert (tmp_path / "restored" / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
    only = cli("pull", "me/quantized", "-o", "config", "--only", "config", "--only", "tokenizer")
    assert only.code == 0, only.stdout
    assert cli("plan", "config").code == 0


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "files", "stored", "loaded"),
    [
        (
            "adapter",
            ("adapter_config.json", "adapter_model.safetensors"),
            f"base_model.model.{Q_PROJ}.lora_B.weight",
            f"base_model.model.{Q_PROJ}.lora_B.default.weight",
        ),
        ("quantized", ("config.json", "model.safetensors"), f"{Q_PROJ}.weight", f"{Q_PROJ}.weight"),
    ],
)
def test_the_code_in_a_card_loads_the_artifact(
    kind: str, files: tuple[str, str], stored: str, loaded: str, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    make = {
        "adapter": lambda: adopt(adapter, tmp_path / "made"),
        "quantized": lambda: quantize(llama, tmp_path / "made"),
    }
    make[kind]()
    config, weights = files
    names = run_code(tmp_path / "made", config, llama)
    assert len(names["tokenizer"]("a dog")["input_ids"]) > 0
    assert torch.equal(names["model"].get_parameter(loaded).data, load_file(tmp_path / "made" / weights)[stored])


def run_code(made: Path, config: str, base: Path) -> dict[str, Any]:
    """Run the code in the card of an artifact, and return its variables."""
    card = make_card(require_manifest(made), CardFacts(read_json(made / config), "org/base"))
    assert front_matter(card)["pipeline_tag"] == "text-generation"
    code = textwrap.dedent(card.split("## Use it\n\n")[1].split("\n\n")[0])
    names: dict[str, Any] = {}
    exec(code.replace("ORG/NAME", str(made)).replace("org/base", str(base)), names)
    return names


def test_the_code_in_a_card_resizes_the_vocabulary_that_the_adapter_contains(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    adopt(tmp_path / "theirs", tmp_path / "made")
    names = run_code(tmp_path / "made", "adapter_config.json", llama)
    assert names["model"].get_input_embeddings().weight.shape[0] == model.config.vocab_size


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        ("adapter", CardFacts({"task_type": "CAUSAL_LM"})),  # nothing names the base
        ("adapter", CardFacts({"task_type": "SEQ_CLS"}, "org/base")),
        (
            "adapter",
            CardFacts({"task_type": "CAUSAL_LM"}, "org/base", {"architectures": ["XForCausalLM"], "auto_map": {}}),
        ),
        ("merged", CardFacts({"architectures": ["LlavaForConditionalGeneration"]}, "org/base")),
        ("merged", CardFacts({"architectures": ["OwnForCausalLM"], "auto_map": {}}, "org/base")),
        (
            "quantized",
            CardFacts({"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "adaptkit"}}),
        ),
        ("merged", CardFacts({"architectures": 5, "quantization_config": 5})),
    ],
)
def test_a_card_shows_no_code_where_it_may_not_load_the_artifact(
    manifest: Manifest, kind: str, facts: CardFacts
) -> None:
    assert "from_pretrained" not in make_card(replace(manifest, kind=kind), facts)


def test_a_relative_licence_link_points_to_the_base_unless_the_artifact_has_the_file(
    cli: Any, make_artifact: Callable[..., Path], hub: LocalHub, repository: Any, tmp_path: Path
) -> None:
    publish_base(cli, tmp_path, BASE_CARD.replace("https://example.org/ducks", "LICENSE.md"))
    for name, files, expected in (
        ("without", {}, f"{hub.url}/org/base/blob/main/LICENSE.md"),
        ("with", {"LICENSE.md": "quack\n"}, "LICENSE.md"),
    ):
        assert cli("publish", make_artifact(name, files=files), "me/model").code == 0
        assert front_matter(card_on(hub, repository))["license_link"] == expected


def test_a_base_name_unknown_to_the_hub_is_omitted_from_the_card_unless_given_as_option(
    cli: Any, artifact: Path, hub: LocalHub, repository: Any
) -> None:
    done = cli("publish", artifact, "me/model")
    assert "org/base, as adapter_config.json calls it, is not on the Hub" in done.stderr
    assert not {"base_model", "base_model_relation"} & set(front_matter(card_on(hub, repository)))
    assert cli("publish", artifact, "me/model", "--base-model", "org/base").code == 0
    assert front_matter(card_on(hub, repository))["base_model"] == "org/base"
