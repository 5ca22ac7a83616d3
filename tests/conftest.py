"""Fixtures for all tests: tiny checkpoints and adapters, made once, and the command line as a process."""

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

gc.disable()  # until all tests are collected: it takes a fifth of the time of their imports
KEEPS_NO_BYTECODE, sys.dont_write_bytecode = sys.dont_write_bytecode, False
"""Until then, pytest may keep the bytecode of tests: rewriting their assertions takes a third of the collection."""
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # waiting threads of one worker slow down the others
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "fixtures"))

import pytest  # noqa: E402
import tiny  # noqa: E402
from command_line import CommandLine  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("adaptkit", deadline=None)  # a timing is a benchmark, never a test
settings.load_profile("adaptkit")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m quick``, do not import the files that mark no test so: all imports together take 15 seconds."""
    others = config.option.markexpr == "quick" and collection_path.suffix == ".py"
    return True if others and "mark.quick" not in collection_path.read_text(encoding="utf-8") else None


def pytest_collection_finish() -> None:
    """Exclude the million objects that live until the end from garbage collection."""
    sys.dont_write_bytecode = KEEPS_NO_BYTECODE
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Include them again: libraries check for leftover objects at exit."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def run_cli() -> Iterator[CommandLine]:
    """Run ``adaptkit ARGS...`` in a process of its own."""
    with CommandLine() as run:
        yield run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the fixtures that are made once; tests must not write there."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="session")
def llama(made: Path) -> Path:
    """A tied bfloat16 Llama in one file, with its tokenizer."""
    return tiny.write_llama(made / "llama")


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    """The tokenizer of ``llama``."""
    from adaptkit.data.tokenizer_files import load_tokenizer

    return load_tokenizer(llama)


@pytest.fixture(scope="session")
def llama_sharded(made: Path) -> Path:
    """The same weights in three shards."""
    return tiny.write_llama(made / "llama-sharded", shards=3)


@pytest.fixture(scope="session")
def llama_nf4(made: Path, llama: Path) -> Path:
    """The same weights quantized, in a folder beside them."""
    from adaptkit.operations.quantize import quantize

    quantize(llama, made / "llama-nf4")
    return made / "llama-nf4"


@pytest.fixture(scope="session")
def gpt2(made: Path) -> Path:
    """A float32 GPT-2."""
    return tiny.write_gpt2(made / "gpt2")


@pytest.fixture(scope="session")
def adapter(made: Path, llama: Path) -> Path:
    """A rank-4 adapter from peft for all linear layers of ``llama``."""
    return tiny.write_peft_adapter(made / "adapter", llama)


@pytest.fixture(scope="session")
def second_adapter(made: Path, llama: Path) -> Path:
    """A rank-2 adapter for some of the layers."""
    return tiny.write_peft_adapter(
        made / "second-adapter", llama, rank=2, seed=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "down_proj"]
    )


@pytest.fixture(scope="session")
def instructions(made: Path) -> Path:
    """Training rows."""
    return tiny.write_instructions(made / "instructions.jsonl")


@pytest.fixture(scope="session")
def judged(made: Path) -> Callable[..., tuple[Any, Any]]:
    """Make the base and the adapter of a case, once, and what peft computes with them."""
    import peft_adapters
    import peft_formulas

    def judge(name: str, dtype: str = "bfloat16") -> tuple[Any, Any]:
        case = peft_adapters.make(made, name, dtype)
        return case, peft_formulas.judge(case.base, case.adapter, name)

    return judge


@pytest.fixture
def certified(copy_of: Callable[..., Path]) -> Callable[..., Path]:
    """Copy an adapter and add the manifest of one that was trained on ``base``."""
    from adaptkit.checkpoint.adapter import read_adapter
    from adaptkit.checkpoint.hashing import fingerprint
    from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest, Target
    from adaptkit.checkpoint.reader import Checkpoint

    def certify(adapter: Path, base: Path, name: str = "") -> Path:
        folder = copy_of(adapter, name or f"{adapter.name}-of-{base.name}")
        read, weights = read_adapter(folder), Checkpoint(base)
        targets = [
            Target(m, weights.spec(f"{m}.weight").shape, fingerprint(weights.read(f"{m}.weight"))) for m in read.modules
        ]
        manifest = Manifest("adapter", {"name": "train"}, (), read.records, targets=tuple(targets))
        (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
        return folder

    return certify


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """Copy a fixture's folder to where a test may change it."""

    def copy(folder: Path, name: str = "") -> Path:
        return Path(shutil.copytree(folder, tmp_path / (name or f"{folder.name}-copy")))

    return copy
