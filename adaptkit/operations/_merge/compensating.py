"""Choose the codes of a quantized base's own format so that what its linears put out changes as the adapters say.

Rounding to the nearest level loses changes that are small beside the distance of levels. With E[x xᵀ] of the inputs,
the error of each column is compensated by the columns after it, so that some codes move although their own weight
changes little; see ``numerics.rounding``.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.writer import disk_errors
from adaptkit.models.model_lock import model_lock
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.grids import Grid
from adaptkit.numerics.rounding import Compensation, compensated
from adaptkit.operations._calibrate.layerwise import layer_moments
from adaptkit.operations._calibrate.text import read_calibration
from adaptkit.operations._merge.edits import Edits
from adaptkit.operations._merge.folding import Fold, Rows, find_lengths
from adaptkit.operations._merge.recoding import Choice, Recoding, moved_only, read_coded
from adaptkit.operations._threads import map_in_threads, thread_count
from adaptkit.operations.options import Calibration, MergeOptions


@model_lock()
def choose_codes(recoding: Recoding, edits: Edits, options: MergeOptions, folder: Path, progress: Progress) -> Choice:
    """Run the base over a text, layer by layer, and write the codes of every changed linear that the text reaches.

    Args:
        recoding: of the base.
        edits: what adapters do to it.
        options: the text, and the number of linears at a time.
        folder: where files of codes go.
        progress: called with steps done.

    Raises:
        DataError: the text cannot be read.
        NonFiniteError: an activation is NaN or infinite.
        UsageError: transformers cannot run the base, or it has no tokenizer.
    """
    decoded, threads = recoding.decoded, thread_count(options.threads)
    tokens = read_calibration(decoded.root, Calibration(files=options.calibrate))
    folds = {name: Fold(edit, find_lengths(decoded, edit, threads)) for name, edit in edits.of.items()}
    files, kept, asked = dict[str, Path](), 0.0, 0.0
    for layer in layer_moments(decoded, tokens, second_moments=True, progress=progress):
        wanted = [f"{module}.weight" for module in layer if f"{module}.weight" in folds]
        wanted = [name for name in wanted if recoding.coded(name) is not None]
        moments = {name: layer[name.removesuffix(".weight")].second_moment for name in wanted}
        distinct = {id(moment): moment for moment in moments.values() if moment is not None}
        found = dict(zip(distinct, map_in_threads(Compensation.of, distinct.values(), threads), strict=True))
        make = partial(_choose, recoding, folds, moments, found)
        for name, (codes, share) in zip(wanted, map_in_threads(make, wanted, threads), strict=True):
            files[name], kept, asked = folder / f"codes-{len(files)}.npy", kept + share[0], asked + share[1]
            with disk_errors(files[name]):
                np.save(files[name], codes)
    return Choice(files, kept, asked)


def _choose(
    recoding: Recoding,
    folds: Mapping[str, Fold],
    moments: Mapping[str, Array | None],
    found: Mapping[int, Compensation],
    name: str,
) -> tuple[Array, tuple[float, float]]:
    """Return the codes of a weight, and its terms of the sums in ``Choice``."""
    weight, moment = recoding.coded(name), moments[name]
    if weight is None or moment is None:
        raise ValueError(f"{name} has no codes or no inputs")
    rows = Rows(0, weight.shape[0])
    coded, before = read_coded(recoding.decoded, weight, rows)
    fold, columns = folds[name], weight.shape[1]
    change = np.concatenate([fold.exact_change(before[r.start : r.start + r.count], r) for r in fold.pieces()])
    groups = coded.groups if coded.groups is not None else np.arange(columns) // (columns // coded.scales.shape[1])
    target = (before + change).astype(np.float32)
    codes = compensated(target, coded.scales, coded.zeros, groups, found[id(moment)], Grid(coded.values))
    made = moved_only(coded, codes)
    moved = made.decode(before.dtype).astype(np.float64) - before
    return made.codes, (float(_product(moved, change, moment)), float(_product(change, change, moment)))


def _product(one: Array, other: Array, moment: Array) -> float:
    """Return Tr(A H Bᵀ), summed in float64 over some rows at a time."""
    return sum(float(((a @ moment) * b).sum()) for a, b in zip(_slices(one), _slices(other), strict=True))


def _slices(values: Array) -> Iterator[Array]:
    return (values[first : first + 256] for first in range(0, len(values), 256))
