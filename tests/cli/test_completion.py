"""Completions that are offered on Tab; the scripts for each shell are click's."""

import pytest
from click.shell_completion import ShellComplete

from adaptkit.cli.main import cli
from adaptkit.training.config import METHODS, OPTIMIZERS


def offered(words: str) -> list[tuple[str, str]]:
    """Kind and value of each completion of the last word."""
    *before, begun = words.split(" ")
    found = ShellComplete(cli, {}, "adaptkit", "_ADAPTKIT_COMPLETE").get_completions(before, begun)
    return [(item.type, item.value) for item in found]


@pytest.mark.parametrize(
    "words",
    [
        "merge base my", "quantize my", "run my", "evaluate --adapter my", "train --data my", "stack -o my",
    ],
)  # fmt: skip
def test_paths_are_left_to_the_shell_to_complete(words):
    assert [kind for kind, _ in offered(words)] in (["file"], ["dir"]), words


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("train --method ", METHODS),
        ("train --optimizer adamw8", OPTIMIZERS[1:]),
        ("stack --method dare", ("dare", "dare_ties")),
        ("quantize --format n", ("nf4", "nvfp4")),
        ("qu", ("quantize",)),
        ("train --rank-pattern ", ()),
        ("train --targets ", ()),
        ("evaluate --prompt ", ()),
    ],
)
def test_options_with_choices_offer_them_and_free_values_offer_nothing(words, values):
    assert offered(words) == [("plain", value) for value in values]
