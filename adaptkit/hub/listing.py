"""The files of a commit, listed before they are downloaded."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from huggingface_hub import constants

from adaptkit.checkpoint.layout import CONFIG_NAME, INDEX_NAME
from adaptkit.checkpoint.quantization import quantization_named, stated_method
from adaptkit.documents import strict_json
from adaptkit.hub.client import Hub, Note, connect
from adaptkit.hub.download import fetch_small
from adaptkit.hub.repository import FileTree, list_tree
from adaptkit.hub.sources import check_weights

__all__ = ["Listing", "list_files"]


@dataclass(frozen=True)
class Listing:
    """The files of a commit.

    Attributes:
        hub: the Hub client.
        repo_id: org/name.
        commit: the commit.
        tree: maps paths to files.
    """

    hub: Hub
    repo_id: str
    commit: str
    tree: FileTree

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit}"

    @property
    def names(self) -> frozenset[str]:
        """The names of the files at the root."""
        return frozenset(path for path in self.tree if "/" not in path)

    @property
    def nbytes(self) -> int:
        """Size of the files at the root."""
        return sum(self.tree[path].size for path in self.names)

    @cached_property
    def stated_method(self) -> str | None:
        """The quantization method that ``config.json`` states; see ``reader.stated_method``. Fetched if not cached.

        Raises:
            CheckpointError: it is malformed.
            IntegrityError: it is too large, or was damaged in transit.
            AuthenticationError, NetworkError: the Hub refused or did not answer.
        """
        return stated_method(self._read(CONFIG_NAME))

    @cached_property
    def has_plain_names(self) -> bool:
        """Whether there is an index, and no tensor in it has a name that only quantized weights have.

        Raises:
            CheckpointError, IntegrityError, AuthenticationError, NetworkError: see ``stated_method``.
        """
        names = self._read(INDEX_NAME).get("weight_map")
        known = names if isinstance(names, dict) else {}
        is_scaled = any(name.endswith(".weight_scale") for name in known)  # of 8-bit weights, which only types show
        return bool(known) and not is_scaled and quantization_named(known) is None

    def _read(self, name: str) -> dict[str, Any]:
        """Read a JSON file, which is fetched if it is not cached; empty if the commit lacks it."""
        if name not in self.tree:
            return {}
        content = fetch_small(self.hub, self.repo_id, self.commit, name, self.tree)
        return strict_json(content, f"{self}: {name}", infinities=True)


def list_files(repo_id: str, commit: str, note: Note) -> Listing | None:
    """List a commit's files; None in the client's offline mode.

    Raises:
        UsageError, CheckpointError: there is no such commit, or it has nothing that adaptkit reads.
        UnsafeInputError, AuthenticationError, NetworkError: see ``resolve_source``.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    hub, what = connect(note), f"{repo_id}@{commit}"
    tree = list_tree(hub, repo_id, commit, what)
    check_weights(what, tree)
    return Listing(hub, repo_id, commit, tree)
