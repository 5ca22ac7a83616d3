"""An error in transformers' own code for an architecture is a one-line error; errors in other code stay."""

import pytest
import tiny
import torch
from transformers import LlamaModel

from adaptkit.errors import UsageError
from adaptkit.training.config import TrainConfig
from adaptkit.training.dtype_errors import reports_unsupported_dtype
from adaptkit.training.evaluation.evaluate import EvaluateOptions, evaluate
from adaptkit.training.loop import train


def test_training_and_evaluation_of_an_architecture_that_mixes_dtypes_name_the_option_to_use(
    run_cli, tmp_path, monkeypatch
):
    """transformers' xLSTM multiplies float32 gates with bfloat16 values, in rows of 64 tokens or more."""
    values = {"num_heads": 4, "num_blocks": 2, "chunk_size": 16}
    monkeypatch.setitem(tiny.ARCHITECTURES, "xlstm", values)
    base = tiny.write_architecture(tmp_path / "base", "xlstm")
    data = tiny.write_instructions(tmp_path / "rows.jsonl", rows=8)
    common = ("--base", base, "--data", data, "--device", "cpu")
    for command in (("evaluate", *common, "--generate"), ("evaluate", "--base", base, "--prompt", "Hi")):
        error, hint = run_cli(*command, "--compute-dtype", "float32").refusal(2)
        assert f"{base}: transformers.models.xlstm.modeling_xlstm, the architecture's own code, cannot" in error
        assert "leave out --generate, --prompt and --sample-prompts" in hint
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


CODE = """
from torch import ones, zeros
from torch.nn.functional import conv1d
def mix(): ones(2, 2) @ ones(2, 2).bfloat16()
def convolve(): conv1d(ones(1, 1, 4).bfloat16(), ones(1, 1, 2))
def lacks(): ones(2, 2).bfloat16().cholesky_inverse()
def shapes(): ones(2, 2) @ ones(3, 2)
def scatter(): zeros(4).scatter_(0, zeros(2, dtype=int), ones(2).bfloat16())
def ours(): mismatch()
def forward(*inputs, **options): mix()
def backward():
    hidden = ones(2, requires_grad=True) * 1
    hidden.register_hook(lambda gradient: mix())
    hidden.sum().backward()
def delayed():
    DelayedError("no kernel for 'BFloat16'", 1)(ones(2, requires_grad=True)).sum().backward()
def failing_in_backward(forward):
    def run(*inputs, **options):
        found = forward(*inputs, **options)
        found.last_hidden_state = DelayedError("no kernel for 'BFloat16'", 1)(found.last_hidden_state)
        return found
    return run
"""


@pytest.fixture
def functions():
    """Functions that raise errors, in a module of transformers."""
    found = {
        "__name__": "transformers.models.made",
        "mismatch": mismatch,
        "DelayedError": torch._C._functions.DelayedError,
    }
    exec(CODE, found)
    return found


@pytest.mark.parametrize("name", ["mix", "convolve", "scatter", "lacks", "backward", "delayed"])
def test_mixed_dtypes_and_missing_operations_in_transformers_are_unsupported(functions, tmp_path, name):
    with (
        pytest.raises(UsageError, match="cannot compute this architecture in bfloat16"),
        reports_unsupported_dtype(tmp_path, "bfloat16"),
    ):
        functions[name]()


def test_an_error_while_answers_are_generated_is_reported_too(functions, llama, monkeypatch):
    monkeypatch.setattr(LlamaModel, "forward", functions["forward"])
    options = EvaluateOptions(prompts=("hello",), max_new_tokens=1, compute_dtype="bfloat16", device="cpu")
    with pytest.raises(UsageError, match="cannot compute this architecture in bfloat16"):
        evaluate(llama, options=options)


def test_an_error_in_the_backward_pass_of_a_step_is_reported_too(functions, llama, instructions, tmp_path, monkeypatch):
    """The forward passes before the first step succeed; with --shard-base, the first is in a step, too."""
    monkeypatch.setattr(LlamaModel, "forward", functions["failing_in_backward"](LlamaModel.forward))
    config = TrainConfig(str(llama), (str(instructions),), steps=1, compute_dtype="bfloat16", device="cpu")
    with pytest.raises(UsageError, match="cannot compute this architecture in bfloat16"):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "dtype"), [("mix", "float32"), ("shapes", "bfloat16"), ("ours", "bfloat16")])
def test_errors_in_float32_about_something_else_or_in_other_code_are_not_changed(functions, tmp_path, name, dtype):
    with pytest.raises(RuntimeError), reports_unsupported_dtype(tmp_path, dtype):
        functions[name]()
