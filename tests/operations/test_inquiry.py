"""transformers answers from a process of its own as it would from this one, and is not loaded here."""

import json
import os
import subprocess
import sys

import pytest
import tiny

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError
from adaptkit.operations._inquiry import Inquiry
from adaptkit.operations._roles import roles_here

ASK = """
import json, sys
from pathlib import Path
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError
from adaptkit.operations._inquiry import Inquiry

inquiries = [Inquiry(Checkpoint(Path(folder))) for folder in sys.argv[1:]]  # at the same time
answers = []
for inquiry in inquiries:
    with inquiry:
        try:
            roles = inquiry.answer()
            of = {name: [role.kind, role.is_linear, list(role.paths)] for name, role in roles.of.items()}
            answers.append([of, roles.read_from, roles.head, roles.tied])
        except UsageError as error:
            answers.append(error.message)
print(json.dumps([answers, "transformers" in sys.modules]))
"""
LEAVE = """
import sys
from pathlib import Path
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.operations._inquiry import Inquiry

with Inquiry(Checkpoint(Path(sys.argv[1]))) as inquiry:
    print(inquiry._process.pid)
"""


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_answer_is_the_one_given_here(llama, copy_of, tmp_path):
    mixtral, broken = tiny.write_family(tmp_path / "mixtral", "mixtral"), copy_of(llama)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "2"}))
    (found, *others), loaded = json.loads(run(ASK, llama, mixtral, broken))
    for folder, answer in zip((llama, mixtral), (found, others[0]), strict=True):
        roles = roles_here(Checkpoint(folder))
        of = {name: [role.kind, role.is_linear, list(role.paths)] for name, role in roles.of.items()}
        assert answer == [of, roles.read_from, roles.head, roles.tied]
    with pytest.raises(UsageError) as caught:
        roles_here(Checkpoint(broken))
    assert others[1] == caught.value.message
    assert not loaded


def test_whoever_leaves_before_the_answer_leaves_no_process(llama):
    number = int(run(LEAVE, llama))
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_transformers_is_asked_here_where_it_is_loaded(llama):
    import transformers

    with Inquiry(Checkpoint(llama)) as inquiry:
        assert inquiry._process is None
        assert transformers.__version__ in inquiry.answer().read_from
