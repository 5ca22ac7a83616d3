"""An architecture that transformers cannot compute in bfloat16 is a one-line error; errors in other code stay."""

import pytest
import tiny
import torch

from adaptkit.errors import UsageError
from adaptkit.training.dtype_errors import reports_unsupported_dtype


def test_training_and_evaluation_of_an_architecture_that_mixes_dtypes_name_the_option_to_use(
    run_cli, tmp_path, monkeypatch
):
    """transformers' xLSTM multiplies float32 gates with bfloat16 values, in rows of 64 tokens or more."""
    values = {"num_heads": 4, "num_blocks": 2, "chunk_size": 16}
    monkeypatch.setitem(tiny.ARCHITECTURES, "xlstm", values)
    base = tiny.write_architecture(tmp_path / "base", "xlstm")
    data = tiny.write_instructions(tmp_path / "rows.jsonl", rows=8)
    common = ("--base", base, "--data", data, "--device", "cpu")
    adapter = tmp_path / "adapter"
    for command in (("train", *common, "-o", adapter, "--steps", 1, "--rank", 2), ("evaluate", *common)):
        done = run_cli(*command, "--compute-dtype", "bfloat16")
        assert done.code == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert f"{base}: transformers cannot compute this architecture in bfloat16 (expected m1 and m2" in done.stderr
        assert "hint: use --compute-dtype float32" in done.stderr
        done = run_cli(*command, "--compute-dtype", "float32")
        assert done.code == 0, done.stderr


def mismatch():
    """Multiply a float32 and a bfloat16 matrix."""
    return torch.ones(2, 2) @ torch.ones(2, 2, dtype=torch.bfloat16)


def test_errors_in_float32_about_something_else_or_in_other_code_are_not_changed(tmp_path):
    code = {"__name__": "transformers.models.made", "torch": torch, "mismatch": mismatch}
    exec("def mix():\n    torch.ones(2, 2) @ torch.ones(2, 2).bfloat16()\n", code)
    exec("def shapes():\n    torch.ones(2, 2) @ torch.ones(3, 2)\ndef ours():\n    mismatch()\n", code)
    with (
        pytest.raises(UsageError, match="cannot compute this architecture"),
        reports_unsupported_dtype(tmp_path, "bfloat16"),
    ):
        code["mix"]()
    for name, dtype in (("mix", "float32"), ("shapes", "bfloat16"), ("ours", "bfloat16")):
        with pytest.raises(RuntimeError), reports_unsupported_dtype(tmp_path, dtype):
            code[name]()
