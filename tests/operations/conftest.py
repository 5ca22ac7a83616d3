"""Fixtures of the tests of ``check``: a base, and adapters of it as peft writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_adapters
import pytest
import tiny
from verdicts import LINEARS


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a head of its own."""
    return tiny.write_llama(tmp_path_factory.mktemp("check") / "untied", tied=False)


@pytest.fixture
def make(tmp_path: Path, untied: Path) -> Callable[..., Path]:
    """Write an adapter, by default of all linear layers of ``untied``, and return its folder."""

    def made(base: Path = untied, name: str = "adapter", **lora_config: Any) -> Path:
        with peft_adapters.quiet():
            return tiny.write_peft_adapter(tmp_path / name, base, **{"target_modules": LINEARS} | lora_config)

    return made
