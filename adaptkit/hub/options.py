"""The options of publishing and pulling."""

import re
from dataclasses import dataclass

from adaptkit.checkpoint.manifest import check_sha256
from adaptkit.checkpoint.signing import Signer, Trust
from adaptkit.errors import UsageError
from adaptkit.hub.names import check_repo_id, is_commit
from adaptkit.hub.parts import PARTS
from adaptkit.settings import Settings, setting

_REF = re.compile(r"(?!refs/|-)(?!.*(\.\.|//|@\{|/\.|\.lock(/|$)))[\w./+@-]*[\w+@-]", re.ASCII)


@dataclass(frozen=True)
class PublishOptions(Settings):
    """Where to publish in the repository, and how; ``signer`` signs the manifest, None leaves it unsigned."""

    branch: str = setting("Branch to commit to; created from main if absent.", "main")
    tag: str | None = setting("Tag for the new commit.", None)
    private: bool = setting("Create the repository as private; an existing public one is rejected.", False)
    pull_request: bool = setting("Open a pull request to main instead of committing to a branch.", False, flag="--pr")
    base_model: str | None = setting(
        "Base named in the model card. Default: from the artifact.", None, metavar="ORG/NAME"
    )
    signer: Signer | None = None
    check: bool = setting("Download the commit afterwards and compare every byte.", False)

    def validate(self) -> None:
        """See ``Settings``."""
        for kind, name in (("branch", self.branch), ("tag", self.tag)):
            if name is not None and (not _REF.fullmatch(name) or is_commit(name)):
                raise UsageError(f"{name!r} is not a valid {kind} name", hint="use a name such as v1.0")
        if self.tag == self.branch:
            raise UsageError(f"{self.tag!r} cannot be both branch and tag", hint="choose another --tag")
        if self.pull_request and (self.tag or self.private or self.branch != "main"):
            raise UsageError(
                "a pull request always goes to main, and cannot set a tag or the visibility",
                hint="leave these out; to tag the commit, publish again with --tag when the request is merged",
            )
        if self.base_model is not None:
            check_repo_id(self.base_model)


@dataclass(frozen=True)
class PullOptions(Settings):
    """What to download of an artifact, and what to require of it; ``trust`` is the required signer, None for any."""

    revision: str | None = None
    only: tuple[str, ...] = setting("Part of the artifact to download. Default: all.", (), choices=tuple(PARTS))
    manifest_sha256: str | None = setting("Required sha256 of the manifest.", None, metavar="HASH")
    trust: Trust | None = None

    def validate(self) -> None:
        """See ``Settings``."""
        check_sha256(self.manifest_sha256)
        if self.revision == "":
            raise UsageError("revision: is empty", hint="use a branch, tag or commit, or leave it out for main")
