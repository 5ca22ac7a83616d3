"""What rows of many trainers say of which answers are to be learned, and after which prompt."""

from collections.abc import Mapping
from typing import Any

from adaptkit.errors import DataError

MARKS = ("weight", "loss", "train")
"""Of a message; OpenAI's, ms-swift's and axolotl's."""

_PREFERENCE = ("chosen", "rejected")
_UNWANTED = ("label", "kto_tag")
"""TRL's and LLaMA-Factory's: booleans. Texts and numbers under these names are classes of something else."""
_VARIABLES = "chat_template_kwargs"


def check_wanted(row: Mapping[str, Any], where: str, layout: str, last_role: str) -> None:
    """Refuse a conversation whose answer is somewhere else than in it, or is not wanted, or whose prompt is another.

    Args:
        row: without columns that are None.
        where: it came from.
        layout: of the conversation.
        last_role: of it; rows whose conversation has the chosen answer, too, are read.

    Raises:
        DataError: as it says.
    """
    if last_role != "assistant" and all(name in row for name in _PREFERENCE):
        raise DataError(
            f"{where}: {layout} has no answer at its end, beside chosen and rejected",
            hint=f"put the chosen answer at the end of {layout}; there is no learning from preferences",
        )
    if row.get(_VARIABLES):
        raise DataError(
            f"{where}: has {_VARIABLES} of its own, and the chat template gets the same for all rows",
            hint="remove the column; --chat-template-kwargs NAME=VALUE of train and evaluate sets them for all rows",
        )
    unwanted = next((name for name in _UNWANTED if row.get(name) is False), None)
    if unwanted is not None:
        raise DataError(
            f"{where}: its {unwanted} is false, which marks an answer that is not wanted",
            hint=f"leave such rows out; rename the column if its {unwanted} says something else",
        )


def is_marked_out(message: Mapping[str, Any], where: str) -> bool:
    """Whether a message is taken out of the loss.

    Raises:
        DataError: what says so is neither 0, 1, false nor true, or two say different things.
    """
    given = {name: message[name] for name in MARKS if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise DataError(
                f"{where} has the {name} {value!r}",
                hint="0 or false takes an answer out of the loss, 1 or true leaves it in",
            )
    if len(set(given.values())) > 1:
        said = " and ".join(f"{name} {value!r}" for name, value in given.items())
        raise DataError(f"{where} has {said}, which contradict each other", hint="leave one of them")
    return 0 in given.values()
