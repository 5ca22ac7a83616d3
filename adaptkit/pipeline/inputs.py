"""Check that sources are of kinds that the steps take, first as far as that is known without downloading them."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from adaptkit.checkpoint.manifest import MANIFEST_NAME
from adaptkit.errors import UnsafeInputError
from adaptkit.hub.listing import Listing
from adaptkit.pipeline.artifact import check_kind, kind_of, listed_kind
from adaptkit.pipeline.foresight import prefix_errors
from adaptkit.pipeline.recipe import Recipe, Step
from adaptkit.pipeline.sources import Location
from adaptkit.pipeline.steps._kind import Input
from adaptkit.settings import Place


class InputChecks:
    """Checks the sources that the steps of a run use, themselves or as a copy that another step makes.

    Args:
        recipe: of the run.
        steps: of the run.
    """

    def __init__(self, recipe: Recipe, steps: Sequence[Step]) -> None:
        self._recipe, self._steps = recipe, steps
        self._kind_of = cache(kind_of)  # reading all headers of a large checkpoint takes seconds

    def check(self, found: Mapping[str, Location], *, hashed: bool) -> None:
        """Check that steps take these sources; other sources are not checked.

        Args:
            found: maps names of sources to where they are.
            hashed: whether their content was compared with their manifests. Until then, damage is not an error here:
                the comparison names the damaged file.

        Raises:
            AdaptkitError: a step does not take its input, or its kind cannot be found.
        """
        for step in self._steps:
            for taken, name in step.takes():
                maker = self._recipe.steps.get(name)
                is_copy = maker is not None and None in maker.makes.values()  # of the maker's first input
                source = next(maker.takes())[1] if maker is not None and is_copy else name
                location = found.get(source, Location(None))
                place = step.place.at(*taken.key.split("."))
                as_adapter = is_copy or taken.takes == "adapter"
                if location.path is not None:
                    try:
                        self._check_path(location.path, as_adapter, step, taken, name, place)
                    except UnsafeInputError:
                        if hashed or not (location.path / MANIFEST_NAME).exists():
                            raise
                elif location.listing is not None:
                    _check_listing(location.listing, as_adapter, step, taken, name, place)

    def _check_path(self, path: Path, as_adapter: bool, step: Step, taken: Input, name: str, place: Place) -> None:
        if path.is_dir() == (taken.takes == "file"):
            problem = "folder; expected a file" if path.is_dir() else "file; expected a folder"
            raise place.error(f"{name!r} is a {problem}")
        with prefix_errors(step):
            kind = self._kind_of(path, as_adapter=as_adapter) if taken.takes not in ("file", "folder") else None
        if kind is not None:
            check_kind(kind, taken.takes, name, place)
        with prefix_errors(step):
            taken.check(path)


def _check_listing(listing: Listing, as_adapter: bool, step: Step, taken: Input, name: str, place: Place) -> None:
    if not taken.made and MANIFEST_NAME in listing.names:
        raise place.error(f"{name!r} already has a manifest", hint="use it as it is")
    if taken.takes != "folder":
        with prefix_errors(step):
            kind = listed_kind(listing, as_adapter=as_adapter)
            if kind == "checkpoint" and taken.takes == "quantized checkpoint" and listing.has_plain_names:
                kind = "unquantized checkpoint"
        check_kind(kind, taken.takes, name, place)
