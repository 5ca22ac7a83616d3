"""Names of repositories, as typed, in place of the long paths of their copies in huggingface_hub's cache."""

import os
import re
import sys


def as_repositories(text: str) -> str:
    """Name repositories in a text for people as the command line does: ``org/name[@revision]``.

    One that was not typed, or with several revisions, is named with its commit. A path that was typed stays.
    """
    if "/models--" not in text:  # else the Hub's client, which takes long to import, is loaded already
        return text
    from adaptkit.hub.sources import hub_cache

    given = {part for argument in sys.argv[1:] for part in argument.split("=", 1)}

    def named(found: re.Match[str]) -> str:
        repo_id = f"{found[1]}/{found[2]}"
        typed = [part for part in given if part.partition("@")[0] == repo_id]
        if any(part.startswith(found[0]) for part in given):
            return found[0]
        return typed[0] if len(typed) == 1 else f"{repo_id}@{found[3]}"

    cache = "|".join(re.escape(folder) for folder in (hub_cache(), os.path.abspath(hub_cache())))
    snapshot = r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})\b"
    return re.sub(rf"(?<![\w/.-])(?:{cache})/{snapshot}", named, text)  # not within a longer path
