"""The options of a run."""

from dataclasses import dataclass
from pathlib import Path

from adaptkit.checkpoint.signing import Signer
from adaptkit.settings import Settings, setting


@dataclass(frozen=True)
class RunOptions(Settings):
    """How to run a recipe; ``signer`` signs where steps sign, None is the identity of the CI job or a browser login."""

    work: Path | None = setting(
        "Folder for the outputs of steps. Default: .adaptkit beside the recipe.", None, metavar="DIR"
    )
    locked: bool = setting("Fail if anything differs from recipe.lock.", False)
    offline: bool = setting("Do not contact the Hub; fail if a source is not cached or a step publishes.", False)
    verify: bool = setting("Read every byte of sources and kept outputs again.", False)
    until: str | None = setting("Run only this step and its dependencies.", None, metavar="STEP")
    signer: Signer | None = None
