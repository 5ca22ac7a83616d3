"""The card that publishing adds: what it says is in the artifact's files, and the licence in its base's card.

What a training run measured is in ``metrics.jsonl``:

    {"step": 3, "loss": …, "learning_rate": …, …}     a step
    {"step": 3, "held_out_loss": …}                   a measurement, 0 before the first step
"""

import json
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urljoin

from adaptkit.checkpoint.layout import (
    ADAPTER_CONFIG_NAME,
    CARD_NAME,
    CONFIG_NAME,
    METRICS_NAME,
    PICTURE_NAME,
    read_config,
    resolve_inside,
)
from adaptkit.checkpoint.manifest import SIGNATURE_NAME, Manifest
from adaptkit.errors import AuthenticationError, CheckpointError, UsageError
from adaptkit.hub._client import Hub
from adaptkit.hub._errors import is_no_repository
from adaptkit.hub._fetch import download
from adaptkit.hub._staging import Artifact, gather, has_card, in_memory
from adaptkit.hub.card import CardFacts, base_model, make_card, read_licence
from adaptkit.hub.secrets import redact


def with_card(hub: Hub, path: Path, manifest: Manifest, base: str | None, will_sign: bool) -> Artifact:
    """Add a card to an artifact that has none, and bring the signature that its folder has.

    Args:
        hub: where the card of the base is.
        path: the artifact's folder.
        manifest: its manifest.
        base: name of the base on the Hub, for the card.
        will_sign: whether what is published is signed; the folder's signature then stays behind.

    Raises:
        UsageError: there is a card already, which a base cannot be added to; or a signature, which a card would break.
    """
    signature = path / SIGNATURE_NAME
    if has_card(manifest):
        if base is not None:
            raise UsageError(
                f"{path}: already has a model card, which --base-model does not change", hint="leave out --base-model"
            )
        artifact = gather(path, manifest)
    elif signature.is_file() and not will_sign:
        raise UsageError(
            f"{path}: is signed without a model card, and publishing adds one to its manifest",
            hint="sign what is published with --sign KEY, or remove adaptkit-manifest.sig",
        )
    else:
        artifact = gather(path, manifest, make_card(manifest, _card_facts(hub, path, manifest, base)))
    if signature.is_file() and not will_sign:
        signed = in_memory(SIGNATURE_NAME, signature.read_bytes())
        artifact = replace(artifact, contents=(*artifact.contents, signed))
    return artifact


def _card_facts(hub: Hub, root: Path, manifest: Manifest, base: str | None) -> CardFacts:
    """Gather what the card of an artifact says.

    Args:
        hub: where the base's card is, and who is told of what the card lacks.
        root: the artifact's folder.
        manifest: its manifest.
        base: name of the base on the Hub; None for what the configuration names.

    Raises:
        CheckpointError: a file of the artifact is malformed.
        NetworkError: the base's card is not to be had just now.
    """
    names = {record.path for record in manifest.files}
    config_name = ADAPTER_CONFIG_NAME if manifest.kind == "adapter" else CONFIG_NAME
    config = read_config(resolve_inside(root, config_name)) if config_name in names else {}
    named = base_model(config)
    called = base or named
    licence = _licence(hub, called, names, is_sure=base is not None) if called else None
    if licence is None:
        why = f"{named}, as {config_name} calls it, is not on the Hub" if named else "the artifact names none"
        hub.note(f"the model card names no base model: {why}; name it with --base-model ORG/NAME")
    elif manifest.kind == "adapter" and named is None:
        found = config.get("base_model_name_or_path")  # 'gpt2' is one of old, and found
        hub.note(f"{config_name} calls the base {found!r}, a name that peft may not find on the Hub")
    return CardFacts(
        config=config,
        base=None if licence is None else called,
        licence=licence or {},
        figures=read_figures(resolve_inside(root, METRICS_NAME)) if METRICS_NAME in names else (),
        picture=PICTURE_NAME if PICTURE_NAME in names else None,
    )


def _licence(hub: Hub, base: str, names: Collection[str], is_sure: bool) -> dict[str, str | list[str]] | None:
    """What the base's card says of its licence, for an artifact of these files; None if there is no such base.

    A folder's path may look like a repository's name, so one that the Hub does not know is none unless it is sure.
    """
    with TemporaryDirectory(prefix="adaptkit-base-") as folder:
        try:
            card = download(hub, base, None, CARD_NAME, Path(folder)).read_text("utf-8", "replace")
        except (UsageError, AuthenticationError) as error:
            if not is_sure and isinstance(error, UsageError) and is_no_repository(error):
                return None
            hub.note(f"the model card names no licence: {error.message}")
            return {}
    licence = read_licence(card)
    if not licence:
        hub.note(f"the model card names no licence: the card of {base} names none")
    link = licence.get("license_link")
    if isinstance(link, str) and link.removeprefix("./") not in names:
        # It may be a file of the base's, which this artifact does not have.
        licence["license_link"] = urljoin(redact(f"{hub.api.endpoint}/{base}/blob/main/"), link)
    return licence


def read_figures(path: Path) -> list[tuple[str, str]]:
    """Read what a run measured.

    Args:
        path: of ``metrics.jsonl``.

    Returns:
        Label and value of each figure.

    Raises:
        CheckpointError: a line is not what a run writes.
    """
    lines = [_line(path, number, text) for number, text in enumerate(path.read_bytes().splitlines(), 1)]
    losses, held_out = _measured(lines, "loss"), _measured(lines, "held_out_loss")
    figures = []
    if losses:
        first, last = min(losses), max(losses)
        figures.append(("Steps", str(last)))
        figures.append(("Training loss", f"{losses[first]:.4f} (step {first}) to {losses[last]:.4f} (step {last})"))
    if held_out:
        first, best = min(held_out), min(held_out, key=lambda step: held_out[step])
        if first == 0:
            figures.append(("Held-out loss before", f"{held_out[first]:.4f}"))
        figures.append(("Lowest held-out loss", f"{held_out[best]:.4f} (step {best})"))
        figures.append(("Last held-out loss", f"{held_out[max(held_out)]:.4f} (step {max(held_out)})"))
    return figures


def _line(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: line {number} is not JSON", hint="publish the folder that train wrote"
        ) from error
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise CheckpointError(f"{path}: line {number} has no step number", hint="publish the folder that train wrote")
    return line


def _measured(lines: list[dict[str, Any]], name: str) -> dict[int, float]:
    """Step -> what was measured; a step whose loss was no number has none."""
    found = {line["step"]: line[name] for line in lines if isinstance(line.get(name), int | float)}
    return {step: float(value) for step, value in found.items() if math.isfinite(value)}
