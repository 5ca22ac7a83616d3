"""Rows of datasets on the Hugging Face Hub, read with the package ``datasets`` and its cache."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from adaptkit.errors import AdaptkitError, AuthenticationError, DataError, NetworkError, UsageError, install_hint


def read_hub_rows(
    name: str, config: str | None = None, revision: str | None = None, split: str | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read a dataset; it is downloaded once, then read from the cache until it changes on the Hub.

    Args:
        name: org/name.
        config: one of the dataset's configurations; None if it has only one.
        revision: branch, tag or commit; the main branch if None.
        split: ``train`` if None.

    Yields:
        The place of a row (name and row number), and the row.

    Raises:
        UsageError: ``datasets`` is not installed, or there is no such dataset, configuration or split.
        AuthenticationError: the dataset needs a token, or one with more permissions.
        NetworkError: the Hub did not answer, or reported a temporary failure. A cached copy is not used then, since it
            may be another version.
        DataError: the dataset cannot be read.
    """
    split = split or "train"
    whole = "/".join(filter(None, (name, config))) + (f"@{revision}" if revision else "") + f":{split}"
    with _quiet_datasets() as datasets:
        try:
            builder = datasets.load_dataset_builder(name, config, revision=revision)
            if type(builder).__name__ == "Cache" and not datasets.config.HF_HUB_OFFLINE:
                raise NetworkError(
                    f"{name}: the Hub does not provide it, and the cached copy may be another version",
                    hint="try again, or set HF_HUB_OFFLINE=1 to use the cached copy",
                )
            builder.download_and_prepare()
            found = builder.as_dataset(split=split)
        except datasets.exceptions.DatasetNotFoundError as error:
            if "gated" in str(error):
                hint = "accept them on its page on the Hub, then run `hf auth login`"
                raise AuthenticationError(f"{name}: its terms must be accepted first", hint=hint) from error
            hint = "check the name; a private dataset needs `hf auth login`"
            raise UsageError(f"{name}: not found, neither as a file nor as a dataset on the Hub", hint=hint) from error
        except (ConnectionError, TimeoutError) as error:
            hint = "try again, or use a local file"
            raise NetworkError(f"{name}: no such file, and the Hub does not answer", hint=hint) from error
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            status = _status(error) if isinstance(error, OSError) else None
            if isinstance(error, ValueError):  # no such configuration or split
                raise UsageError(f"{whole}: {error}", hint="write it as org/name/config@revision:split") from error
            if status is None and isinstance(error, datasets.exceptions.DatasetsError):  # no readable files
                raise DataError(f"{whole}: cannot be read ({error})", hint="use a local file instead") from error
            if status is None and error.errno is not None:  # a local error, as of the disk
                raise
            raise _refusal(name, status) from error
    for number, row in enumerate(found, 1):
        yield f"{whole}, row {number}", row


def _status(error: BaseException | None) -> int | None:
    """Return the Hub's HTTP status from a chain of exceptions: datasets may report it as missing files."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__ or error.__context__
    return None


def _refusal(name: str, status: int | None) -> AdaptkitError:
    if status is None:
        return NetworkError(f"{name}: no usable answer from the Hub", hint="try again, or use a local file")
    said = f"{name}: the Hub answered {status}"
    if status in (401, 403):
        return AuthenticationError(said, hint="set HF_TOKEN, or run `hf auth login`, with a token that may read it")
    if status in (408, 425, 429) or status >= 500:
        return NetworkError(said, hint="try again, or use a local file")
    return UsageError(said, hint="check the name")


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """Import ``datasets`` with progress bars and warnings off; restore its settings afterwards."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError("datasets on the Hub need the package datasets", hint=install_hint("train")) from error
    shown, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(level)
        if not shown:
            datasets.enable_progress_bars()
