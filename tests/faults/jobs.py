"""The commands that are disturbed, their tiny inputs, and checks of what they leave.

A trial is a folder in which one command runs:

    trial-17/out          its output; for ``run``, recipe.yaml, recipe.lock and .adaptkit/ instead
    trial-17/temporary/   its temporary files
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import tiny

MANIFEST, TEMPORARY = "adaptkit-manifest.json", "temporary"
RECIPE = """\
name: tiny
sources:
  base: {path: ../inputs/base}
  lora: {path: ../inputs/adapter}
steps:
  small: {quantize: base}
  lighter: {resize: lora, rank: 2}
  merged: {merge: base, adapters: [lighter]}
"""
TRAIN = """
    --rank 4 --steps 3 --batch-size 2 --micro-batch-size 1 --learning-rate 0.01 --compute-dtype float32 --device cpu
    --save-every 1 --eval-every 2 --page-kib 4 --optimizer-pages-mib 0.01 --pack --max-length 128
"""
Tree = dict[str, bytes]


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: name of the command, or of a use of it.
        arguments: arguments of ``adaptkit``; {in} is the folder of the inputs, and {repo} the trial's repository.
        replaces: whether an older output exists under the final name beforehand.
    """

    name: str
    arguments: tuple[str, ...]
    replaces: bool = False

    def argv(self, inputs: Path, trial: Path) -> list[str]:
        """Return the arguments to run in the folder of a trial."""
        return [text.replace("{in}", str(inputs)).replace("{repo}", f"me/{trial.name}") for text in self.arguments]

    def prepare(self, inputs: Path, trial: Path) -> None:
        """Make the folder of a trial."""
        (trial / TEMPORARY).mkdir(parents=True)
        if self.name == "run":
            (trial / "recipe.yaml").write_text(RECIPE)
        if self.replaces:
            shutil.copytree(inputs / "merged", trial / "out")


def _job(text: str, name: str = "", replaces: bool = False) -> Job:
    arguments = tuple(text.split())
    return Job(name or arguments[0], (*arguments, "--quiet"), replaces)


JOBS = (
    _job("quantize {in}/base -o out --max-shard-size 40KB"),
    _job("dequantize {in}/nf4 -o out"),
    _job("merge {in}/base {in}/adapter -o out"),
    _job("merge {in}/base {in}/second -o out --force", "merge --force", replaces=True),
    _job("unmerge {in}/merged -o out --adapter {in}/adapter"),
    _job("stack {in}/adapter {in}/second -o out --method cat"),
    _job("extract {in}/merged {in}/base -o out --rank 4"),
    _job("resize {in}/adapter -o out --rank 2"),
    _job("adopt {in}/adapter -o out --base {in}/base"),
    _job(f"train --base {{in}}/nf4 --data {{in}}/rows.jsonl -o out {TRAIN}"),
    _job("publish {in}/stacked {repo} --tag v1"),
    _job("pull me/source -o out"),
    _job("run recipe.yaml"),
)
INPUTS = (
    "quantize {in}/base -o {in}/nf4",
    "merge {in}/base {in}/adapter -o {in}/merged",
    "stack {in}/adapter {in}/second -o {in}/stacked --method cat",
)
"""Commands that make further inputs from those of ``write_sources``."""


def write_sources(inputs: Path) -> None:
    """Write a base, two adapters and training rows."""
    base = tiny.write_llama(inputs / "base", shards=3)
    tiny.write_peft_adapter(inputs / "adapter", base)
    tiny.write_peft_adapter(inputs / "second", base, rank=2, seed=2, target_modules=["q_proj", "down_proj"])
    tiny.write_instructions(inputs / "rows.jsonl", rows=16)


def tree(folder: Path) -> Tree:
    """Return the content of all files of a trial, except temporary files and notes of ``run``."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name.split("/")[0] != TEMPORARY and not _IS_NOTE.fullmatch(name):
            found[name] = path.read_bytes()
    return found


_IS_NOTE = re.compile(r"\.adaptkit/(hashes|[0-9a-f]+/[^/]*)\.json(\.partial)?")
"""Notes of ``run``: times of files, and reports of steps, which lack figures if a kill came just after the step."""


def below(whole: Tree, name: str) -> Tree:
    """Return the part of a tree in one of its folders."""
    return {path: content for path, content in whole.items() if path.startswith(f"{name}/")}


def published(hub: Path, repository: str) -> Tree:
    """Return the hashes of a repository's files on main and on the tag; empty if there are none."""
    folder = hub / "repos" / repository
    if not (folder / "state.json").exists():
        return {}
    state, found = json.loads((folder / "state.json").read_bytes()), {}
    for kind, name in (("heads", "main"), ("tags", "v1")):
        if name in state[kind]:
            files = json.loads((folder / "commits" / f"{state[kind][name]}.json").read_bytes())["files"]
            found |= {f"{name}/{path}": file["sha256"].encode() for path, file in files.items()}
    del found["main/.gitattributes"]
    found.pop("v1/.gitattributes", None)
    return found


def result(job: Job, trial: Path, hub: Path) -> Tree:
    """Return all that a finished command made."""
    return published(hub, f"me/{trial.name}") if job.name == "publish" else tree(trial)


def too_early(job: Job, trial: Path, hub: Path, expected: Tree, old: Tree) -> list[str]:
    """Return final names under which there is something other than a complete result.

    Args:
        job: the job that was disturbed.
        trial: folder of its trial.
        hub: folder of the Hub.
        expected: files that an undisturbed run leaves.
        old: files that existed under the final name before.
    """
    found = result(job, trial, hub)
    if job.name == "publish":
        names = {name.split("/")[0] for name in found}
        return sorted(name for name in names if below(found, name) != below(expected, name))
    finals = [os.path.dirname(name) for name in expected if os.path.basename(name) == MANIFEST]
    finals = [final for final in finals if not any(final.startswith(f"{other}/") for other in finals)]
    wrong = [final for final in finals if below(found, final) not in ({}, below(expected, final), below(old, final))]
    if job.replaces and not below(found, "out"):
        aside = {path.replace("out.replaced/", "out/", 1): c for path, c in below(found, "out.replaced").items()}
        wrong += [] if aside == below(old, "out") else ["out.replaced"]
    if job.name == "run" and found.get("recipe.lock") not in (None, expected["recipe.lock"]):
        wrong.append("recipe.lock")
    return wrong
