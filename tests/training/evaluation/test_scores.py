"""Scores equal values computed by hand."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adaptkit.training.evaluation.scores import score

ROOT_WORDS = ["the cat sat on the mat", "a dog barks at night", "whales are quiet under water"]


def test_answers_equal_to_their_references_score_highest_and_unrelated_ones_zero():
    same = score(ROOT_WORDS, [[text] for text in ROOT_WORDS])
    assert same.bleu == pytest.approx(100)
    assert same.rouge_l == 1
    assert same.cider == pytest.approx(10, abs=0.01)
    other = score(["zebra"] * 3, [[text] for text in ROOT_WORDS])
    assert (other.bleu, other.meteor, other.rouge_l, other.cider) == (0, 0, 0, 0)
    assert other.nist == 0


def test_meteor_equals_its_formula():
    """Five of six words match in one stretch: P = 5/6, R = 5/7, F = PR/(0.9P + 0.1R), one chunk in five matches."""
    found = score(["the cat sat on the zebra"], [["the cat sat on the mat today"]]).meteor
    precision, recall = 5 / 6, 5 / 7
    f_mean = precision * recall / (0.9 * precision + 0.1 * recall)
    assert found == pytest.approx(f_mean * (1 - 0.5 * (1 / 5) ** 3))


def test_nist_equals_its_formula():
    """All words match: information of 1-grams is log2(N / count), of longer ones log2(count of prefix / count)."""
    found = score(["a b"], [["a b", "a c c"]]).nist
    one = (math.log2(5 / 2) + math.log2(5 / 1)) / 2
    two = math.log2(2 / 1) / 1
    assert found == pytest.approx(one + two)


def test_rouge_l_is_computed_against_the_best_reference():
    """Longest common subsequence 2 of 3 and 2 words: P = 2/3, R = 1."""
    assert score(["whales sing loudly"], [["mosses", "whales sing"]]).rouge_l == pytest.approx(2 * (2 / 3) / (5 / 3))


def test_bleu_equals_its_formula():
    """Precisions 3/4, 2/3, 1/2 and, smoothed, 1/2 of one; the answer is as long as its reference."""
    found = score(["one two three five"], [["one two three four"]]).bleu
    assert found == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_every_reference_of_an_answer_counts():
    answers = ["the cat sat on the mat", "a dog barks at night"]
    few, more = [["felines rest"], ["a dog barks at night"]], [["felines rest", answers[0]], [answers[1]]]
    one, two = score(answers, few), score(answers, more)
    for name in ("bleu", "meteor", "rouge_l", "cider", "nist"):
        assert getattr(two, name) > getattr(one, name), name


def test_undefined_scores_of_empty_answers_and_single_questions_are_none():
    empty = score(["", ""], [["x y"], ["z"]])
    assert (empty.bleu, empty.nist, empty.meteor, empty.rouge_l, empty.cider) == (0, None, 0, 0, 0)
    assert score(["a"], [["a"]]).cider is None
    with pytest.raises(ValueError, match="one each"):
        score(["a"], [[]])


def test_references_without_words_are_accepted():
    """sacrebleu's tokenizer removes <skipped> entirely."""
    found = score(["a b", ""], [["<skipped>"], ["<skipped>"]])
    assert (found.bleu, found.nist, found.meteor, found.cider) == (0, None, 0, None)
    assert score(["a b", "c"], [["<skipped>"], ["c d"]]).nist is not None


SYNONYMS = """
from adaptkit.training.evaluation.scores import score
found = score(["quick car now"], [["quick auto now"]])
print(found.meteor, "|", found.meteor_variant)
"""


def meteor_with(folder):
    environment = os.environ | {"NLTK_DATA": str(folder)}
    done = subprocess.run([sys.executable, "-c", SYNONYMS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    value, variant = done.stdout.strip().split(" | ")
    return float(value), variant


def write_wordnet(folder):
    """Write WordNet in its own format, with one set of synonyms: car, auto."""
    licence = "  1 WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.  \n"
    data = licence
    offset = len(data)
    data += f"{offset:08d} 06 n 02 car 0 auto 0 000 | a thing on wheels  \n"
    folder.mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        noun = part == "noun"
        (folder / f"data.{part}").write_text(data if noun else licence)
        index = "".join(f"{word} n 1 0 1 1 {offset:08d}  \n" for word in ("auto", "car"))
        (folder / f"index.{part}").write_text(licence + (index if noun else ""))
        (folder / f"{part}.exc").write_text("")
    (folder / "lexnames").write_text("".join(f"{number:02d}\tx\t1\n" for number in range(45)))
    for name in ("cntlist.rev", "index.sense"):
        (folder / name).write_text("")


def test_meteor_counts_synonyms_if_nltk_finds_wordnet_and_names_its_variant(tmp_path):
    value, variant = meteor_with(tmp_path)
    assert (value, variant) == (pytest.approx(2 / 3 * (1 - 0.5)), "exact and stem (nltk finds no WordNet)")
    write_wordnet(tmp_path / "corpora" / "wordnet")
    value, variant = meteor_with(tmp_path)
    assert variant == "exact, stem and synonyms of WordNet 3.0"
    assert value == pytest.approx(1 - 0.5 * (1 / 3) ** 3)


def test_a_missing_package_is_reported_with_how_to_install_it(llama, instructions, tmp_path):
    (tmp_path / "sacrebleu.py").write_text("raise ImportError('No module named sacrebleu')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.argv = ['adaptkit', *sys.argv[2:]]\n"
        "from adaptkit.cli.main import main; main()"
    )
    arguments = ["evaluate", "--base", llama, "--data", instructions, "--generate"]
    done = subprocess.run([sys.executable, "-c", code, tmp_path, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: scoring answers needs the metric packages: No module named sacrebleu",
        "hint: pip install '.[eval]' in adaptkit's checkout",
    ]


def test_a_user_without_a_home_folder_is_told_to_set_home():
    """As in a container; Python returns "~" for a home folder that it does not know."""
    if any(Path(prefix, "nltk_data").exists() for prefix in (sys.prefix, "/usr/share", "/usr/local/share", "/usr/lib")):
        pytest.skip("nltk has a folder for its data, so it looks for no other")
    code = "from adaptkit.training.evaluation.scores import require_metrics; require_metrics()"
    environment = os.environ | {"HOME": "~", "NLTK_DATA": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "UsageError: nltk, which scores answers, cannot be loaded: " in done.stderr
