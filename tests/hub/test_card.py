"""The card states facts of the manifest, and the same ones always."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

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


def test_the_same_artifact_gives_the_same_card(make_artifact: Callable[..., Path]) -> None:
    cards = [make_card(require_manifest(f), facts_of(f)) for f in map(make_artifact, "ab")]
    assert cards[0] == cards[1]


def test_an_adapters_card_names_its_base_and_hashes(manifest: Manifest, artifact: Path) -> None:
    card = make_card(manifest, facts_of(artifact))
    assert front_matter(card) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["adaptkit", "lora"],
    }
    assert manifest.tensors_root in card
    assert "0" * 64 in card
    assert "| Modules | 2 |" in card
    assert "| Rank, alpha | 2, 4 |" in card


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        ("merged", {"_name_or_path": "org/base"}, ("transformers", "merge", ["adaptkit"])),
        (
            "quantized",
            {"_name_or_path": "org/base", "quantization_config": {"quant_method": "bitsandbytes"}},
            ("transformers", "quantized", ["adaptkit", "bitsandbytes"]),
        ),
        ("merged", {}, ("transformers", None, ["adaptkit"])),
    ],
)
def test_a_models_card_says_how_it_relates_to_its_base(
    manifest: Manifest, kind: str, config: dict[str, Any], expected: tuple[str, str | None, list[str]]
) -> None:
    front = front_matter(make_card(replace(manifest, kind=kind), CardFacts(config, base_model(config))))
    assert (front["library_name"], front.get("base_model_relation"), front["tags"]) == expected
    assert ("base_model" in front) == bool(config)


@pytest.mark.parametrize(
    "name", ["/home/me/base", "./base", "../a", "~/base", "base", "a/b/c", "C:\\x", "a/b\nc", "", 5]
)
def test_a_path_on_a_disk_is_no_base_model(name: Any) -> None:
    assert base_model({"base_model_name_or_path": name}) is None


def test_no_option_can_leave_its_block(manifest: Manifest) -> None:
    options = {"note": "``` | # heading\n---\n<script>", "key\n# heading": 1}
    card = make_card(replace(manifest, operation={"name": "train", "options": options}), CardFacts())
    lines = [line for line in card.splitlines() if "heading" in line or "script" in line]
    assert lines
    assert all(line.startswith("    ") for line in lines)
