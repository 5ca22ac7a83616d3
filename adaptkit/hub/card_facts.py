"""The model card that publishing adds, from facts in the artifact's files, and what the Hub knows of its base."""

from collections.abc import Collection
from pathlib import Path
from urllib.parse import urljoin

from huggingface_hub import ModelInfo

from adaptkit.checkpoint.layout import ADAPTER_CONFIG_NAME, CONFIG_NAME, read_config, resolve_inside
from adaptkit.checkpoint.manifest import SIGNATURE_NAME, Manifest
from adaptkit.errors import AuthenticationError, UsageError
from adaptkit.hub.card import CardFacts, base_model, make_card
from adaptkit.hub.client import Hub
from adaptkit.hub.client_errors import status_of
from adaptkit.hub.secrets import redact
from adaptkit.hub.staging import Artifact, gather, has_card

_LICENCE_KEYS = ("license", "license_name", "license_link")


def with_card(hub: Hub, path: Path, manifest: Manifest, base: str | None, will_sign: bool) -> Artifact:
    """List an artifact's files with a card, generated if it has none.

    Args:
        hub: the Hub client, for what it knows of the base, and for notes about facts that are missing.
        path: the artifact's folder.
        manifest: its manifest.
        base: name of the base on the Hub, for the card; None for the one that the configuration names.
        will_sign: whether publishing makes a new signature; the folder's signature is then left out.

    Raises:
        UsageError: ``base`` is given but the artifact has a card, or a generated card would invalidate the signature.
        CheckpointError: a file of the artifact is malformed.
        NetworkError: the Hub did not answer for the base.
    """
    names = {record.path for record in manifest.files}
    config_name = ADAPTER_CONFIG_NAME if manifest.kind == "adapter" else CONFIG_NAME
    config = read_config(resolve_inside(path, config_name)) if config_name in names else {}
    named = base_model(config)
    if manifest.kind == "adapter" and named is None:
        name = config.get("base_model_name_or_path")  # peft finds names without an owner, as 'gpt2'
        hub.note(f"{config_name} calls the base {name!r}, a name that peft may not find on the Hub")
    if has_card(manifest):
        if base is not None:
            raise UsageError(
                f"{path}: already has a model card, which --base-model does not change", hint="leave out --base-model"
            )
        return gather(path, manifest)
    if (path / SIGNATURE_NAME).is_file() and not will_sign:
        raise UsageError(
            f"{path}: is signed without a model card, and publishing adds one to its manifest",
            hint="sign what is published with --sign KEY, or remove adaptkit-manifest.sig",
        )
    called = base or named
    is_there, info = _base_info(hub, called, is_sure=base is not None) if called else (False, None)
    if not is_there:
        why = f"{named}, as {config_name} calls it, is not on the Hub" if named else "the artifact gives no ORG/NAME"
        hub.note(f"the model card names no base model: {why}; name it with --base-model ORG/NAME")
    facts = CardFacts(
        config=config,
        base=called if is_there else None,
        base_config=(info.config or {}) if info is not None and manifest.kind == "adapter" else {},
        licence=_licence(hub, str(called), info, names) if info is not None else {},
    )
    return gather(path, manifest, make_card(manifest, facts))


def _base_info(hub: Hub, base: str, is_sure: bool) -> tuple[bool, ModelInfo | None]:
    """Return whether the Hub has a base, and what it tells about it; None if it refuses.

    A folder's path may look like the name of a repository; ``is_sure`` says that the caller gave it as one.
    """
    try:
        return True, hub.model_info(base, base)
    except (UsageError, AuthenticationError) as error:
        if not is_sure and status_of(error) == 404:
            return False, None
        hub.note(f"the model card names no licence: {error.message}")
        return True, None


def _licence(hub: Hub, base: str, info: ModelInfo, names: Collection[str]) -> dict[str, str | list[str]]:
    """Return the licence fields of the base's card; a link to anything but a file of the artifact is absolute."""
    front = vars(info.card_data) if info.card_data is not None else {}
    licence = {key: front[key] for key in _LICENCE_KEYS if _is_plain(front.get(key))}
    if not licence:
        hub.note(f"the model card names no licence: the card of {base} names none")
    link = licence.get("license_link")
    if isinstance(link, str) and link.removeprefix("./") not in names:
        # It may be a relative link to a file in the base's repository.
        licence["license_link"] = urljoin(redact(f"{hub.api.endpoint}/{base}/blob/main/"), link)
    return licence


def _is_plain(value: object) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and item.isprintable() and 0 < len(item) < 300 for item in items)
