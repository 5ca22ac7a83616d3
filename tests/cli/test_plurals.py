"""All commands use the singular for a count of one."""

import re
import shutil

import pytest
import tiny

from adaptkit.wording import counted

ONE = re.compile(r"(?<![\d.,/])1 [a-z]|, 1 in all|\b1 differs?\b")
MANY = re.compile(
    r"(?<![\d.,/])1 (?:(?!of\b)[a-z-]+ )?"
    r"(?:\w*(?:shard|step|sample|shot|row|module|tensor|adapter|file|token|model|layer|window|question|weight|page|fault"
    r"|write-back|answer|conversation|position|deletion|fingerprint|dimension|column|key|line|parameter)s|matrices)\b"
)


@pytest.mark.parametrize(
    ("count", "noun", "verb", "said"),
    [
        (0, "shard", "", "0 shards"),
        (1, "shard", "", "1 shard"),
        (1200, "shard", "", "1,200 shards"),
        (2, "micro-batch", "", "2 micro-batches"),
        (2, "calibrated matrix", "", "2 calibrated matrices"),
        (1, "calibrated matrix", "", "1 calibrated matrix"),
        (3, "entry", "", "3 entries"),
        (2, "bias", "", "2 biases"),
        (3, "more key", "", "3 more keys"),
        (1, "row", "have", "1 row has"),
        (2, "row", "have", "2 rows have"),
        (1, "sample", "are", "1 sample is"),
        (1, "fingerprint", "agree", "1 fingerprint agrees"),
    ],
)
def test_a_noun_and_a_verb_agree_with_their_count(count, noun, verb, said):
    assert counted(count, noun, verb) == said


@pytest.fixture(scope="module")
def folder(made, llama, run_cli):
    """A base, data of one and two rows, and an adapter of rank 1 for one matrix."""
    folder = made / "one-of-each"
    folder.mkdir()
    tiny.write_instructions(folder / "rows.jsonl", rows=2, seed=3)
    (folder / "one.jsonl").write_text((folder / "rows.jsonl").read_text().splitlines(keepends=True)[0])
    (folder / "empty.jsonl").write_text('{"question": "why", "answer": ""}\n{"question": "when", "answer": "now"}\n')
    shutil.copytree(llama, folder / "base")
    tiny.write_peft_adapter(folder / "one", llama, rank=1, target_modules=r"model\.layers\.0\.self_attn\.q_proj")
    return folder


TRAIN = ["train", "--base", "base", "--steps", "1", "--rank", "1", "--targets", "model.layers.0.self_attn.q_proj"]
COMMANDS = {
    "train": [*TRAIN, "--data", "one.jsonl", "--held-out", "0", "-o", "trained"],
    "train, an empty answer": [*TRAIN, "--data", "empty.jsonl", "--held-out", "0", "-o", "x", "--dry-run"],
    "train, a cut sample": [*TRAIN, "--data", "one.jsonl", "--held-out", "0", "-o", "x", "--max-length", "40",
                            "--loss-on", "all", "--dry-run"],
    "train, the same row held out": [*TRAIN, "--data", "one.jsonl", "--held-out-data", "one.jsonl", "-o", "x",
                                     "--dry-run"],
    "train, a batch": [*TRAIN, "--data", "one.jsonl", "--held-out", "0", "-o", "x", "--show-batch"],
    "train, too long": [*TRAIN, "--data", "one.jsonl", "--held-out", "0", "-o", "x", "--max-length", "4", "--too-long",
                        "drop"],
    "evaluate": ["evaluate", "--base", "base", "--data", "one.jsonl", "--shots", "1", "--shots-from", "rows.jsonl"],
    "evaluate, too many shots": ["evaluate", "--base", "base", "--data", "one.jsonl", "--shots", "9", "--shots-from",
                                 "rows.jsonl"],
    "quantize": ["quantize", "base", "-o", "nf4", "--skip", "model.layers.1.*", "--skip", "*.mlp.*", "--skip",
                 "*.[kvo]_proj"],
    "adopt": ["adopt", "one", "--base", "base", "-o", "adopted"],
    "resize": ["resize", "one", "-o", "resized", "--rank", "1"],
    "merge": ["merge", "base", "one", "-o", "merged"],
    "merge, weights": ["merge", "base", "one", "one", "-o", "x", "--weight", "1"],
    "unmerge": ["unmerge", "merged", "-o", "restored", "--adapter", "one"],
    "unmerge, adapters": ["unmerge", "merged", "-o", "x", "--adapter", "one", "--adapter", "one"],
    "extract": ["extract", "merged", "base", "-o", "extracted", "--rank", "1"],
    "verify": ["verify", "merged", "--parents", "."],
    "diff": ["diff", "base", "merged"],
    "check": ["check", "one", "--base", "base"],
    "dequantize": ["dequantize", "nf4", "-o", "plain"],
}  # fmt: skip


def test_no_command_uses_a_plural_for_one(folder, run_cli):
    """Commands run in order, since some use what earlier ones made."""
    for name, command in COMMANDS.items():
        done = run_cli(*command, cwd=folder)
        said = done.stdout + done.stderr
        assert ONE.search(said), f"{name}: {said}"
        assert not MANY.search(said), f"{name}: {said}"
