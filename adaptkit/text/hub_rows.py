"""Rows of data sets on the Hugging Face Hub, by way of the package ``datasets`` and its cache."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from adaptkit.errors import AdaptkitError, AuthenticationError, DataError, NetworkError, UsageError


def read_hub_rows(
    name: str, config: str | None = None, revision: str | None = None, split: str | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read a data set; it is downloaded once, and read from the cache after that, if the Hub has no other by then.

    Args:
        name: org/name.
        config: one of its configurations; it may be left out where there is one.
        revision: branch, tag or commit; its main branch if None.
        split: ``train`` if None.

    Yields:
        Where a row is (name and row), and the row.

    Raises:
        UsageError: ``datasets`` is not installed, or there is no such data set, configuration or split.
        AuthenticationError: it wants a token, or a better one.
        NetworkError: the Hub did not answer, or with a passing failure; that the cache holds one is no help, since
            nobody knows which.
        DataError: it cannot be read.
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
                raise AuthenticationError(
                    f"{name}: its terms must be accepted first",
                    hint="accept them on its page on the Hub, then run `hf auth login`",
                ) from error
            raise UsageError(
                f"{name}: not found, neither as a file nor as a dataset on the Hub",
                hint="check the name; a private dataset needs `hf auth login`",
            ) from error
        except (ConnectionError, TimeoutError) as error:
            raise NetworkError(f"{name}: no such file, and the Hub does not answer",
                               hint="try again, or use a local file") from error  # fmt: skip
        except OSError as error:
            status = _status(error)
            if status is None and isinstance(error, datasets.exceptions.DatasetsError):  # nothing that can be read
                raise DataError(f"{whole}: cannot be read ({error})", hint="use a local file instead") from error
            if status is None and error.errno is not None:  # the disk's
                raise
            raise _refusal(name, status) from error
        except ValueError as error:  # what it says of configurations and splits that are not there
            raise UsageError(f"{whole}: {error}", hint="write it as org/name/config@revision:split") from error
        except datasets.exceptions.DatasetsError as error:
            raise DataError(f"{whole}: cannot be read ({error})", hint="use a local file instead") from error
    for number, row in enumerate(found, 1):
        yield f"{whole}, row {number}", row


def _status(error: BaseException | None) -> int | None:
    """What the Hub answered, which datasets may have wrapped in an error of files that are not there."""
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
    """The package, without progress bars, and as it was afterwards."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            "datasets on the Hub need the package datasets", hint="pip install 'adaptkit[train]'"
        ) from error
    shown, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(level)
        if not shown:
            datasets.enable_progress_bars()
