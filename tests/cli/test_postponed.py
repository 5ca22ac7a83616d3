"""The compiler that waits: nothing that does without it loads it, and who uses it sees all of it.

Each test is a process of its own, since a module is loaded once in a process.
"""

import subprocess
import sys

import pytest

INSIDE = "torch._dynamo.convert_frame"
POSTPONE = "from adaptkit.cli.postponed import postpone_compiler; postpone_compiler()"


def run(code, begin=POSTPONE):
    done = subprocess.run([sys.executable, "-c", f"import sys\n{begin}\n{code}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def arguments(command, llama, instructions, tmp_path):
    return {
        "train": ["train", "--base", llama, "--data", instructions, "-o", tmp_path / "out", "--steps", "1"],
        "evaluate": ["evaluate", "--base", llama, "--data", instructions, "--prompt", "a"],
    }[command]


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_commands_that_compute_with_models_load_no_compiler(run_cli, command, llama, instructions, tmp_path):
    done = run_cli(*arguments(command, llama, instructions, tmp_path), PYTHONPROFILEIMPORTTIME="1")
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.code == 0, done.stderr
    assert {"torch", "transformers.modeling_utils"} <= loaded
    assert INSIDE not in loaded


def test_without_this_transformers_loads_the_compiler():
    run(f"import transformers.modeling_utils; assert '{INSIDE}' in sys.modules", begin="")


@pytest.mark.parametrize(
    "use",
    [
        "import torch._dynamo; torch._dynamo.reset()",
        "import torch; torch._dynamo.reset()",
        "from torch._dynamo import reset",
        "import torch._dynamo.utils",
        "import torch; assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2)).tolist() == [2, 2]",
    ],
)
def test_who_uses_the_compiler_has_it(use):
    run(
        f"import transformers.modeling_utils; assert '{INSIDE}' not in sys.modules\n{use}\n"
        f"assert '{INSIDE}' in sys.modules and type(sys.modules['torch._dynamo']) is type(sys)"
    )


def test_a_compiled_model_computes_the_same():
    run(
        "import torch, transformers\n"
        "config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,\n"
        "    num_attention_heads=2, num_key_value_heads=2, vocab_size=64)\n"
        "model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(8)[None]\n"
        "compiled = torch.compile(model, backend='eager')\n"
        "assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)\n"
    )


def test_an_exported_model_computes_the_same():
    run(
        "import torch\n"
        "layer, x = torch.nn.Linear(3, 2), torch.ones(1, 3)\n"
        "assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))\n"
    )


def test_everything_in_it_is_everything():
    code = "del sys\nfrom torch._dynamo import *\nprint(sorted(globals()))"
    ordinary, late = run(code, begin=""), run(code, f"{POSTPONE}; del postpone_compiler")
    assert "OptimizedModule" in ordinary
    assert late == ordinary


def test_what_is_marked_is_the_function_itself():
    run(
        "import torch\n"
        "def f(): pass\n"
        "assert torch.compiler.disable(f) is f and torch.compiler.disable(recursive=False)(f) is f\n"
        "assert torch.compiler.assume_constant_result(f) is f and torch.compiler.allow_in_graph(f) is f\n"
        f"assert '{INSIDE}' not in sys.modules\n"
    )


def test_threads_that_ask_at_once_all_see_the_whole_module():
    run(
        "import threading, torch, torch._dynamo\n"
        "gate, seen = threading.Barrier(8), []\n"
        "def ask():\n"
        "    gate.wait()\n"
        "    seen.append((torch._dynamo.optimize, torch._dynamo.OptimizedModule, torch._dynamo.reset))\n"
        "threads = [threading.Thread(target=ask) for _ in range(8)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "assert len(seen) == 8 and len(set(seen)) == 1\n"
    )


def test_it_can_be_looked_at_like_any_other_module_once_it_is_loaded():
    run(
        "import importlib, inspect, torch._dynamo as compiler\n"
        "assert compiler.reset and compiler.__spec__.loader is compiler.__loader__\n"
        "assert 'def reset' in inspect.getsource(compiler) and not hasattr(compiler, 'no_such_name')\n"
        "assert importlib.import_module('torch._dynamo') is compiler\n"
    )


def test_a_library_keeps_an_ordinary_torch():
    run(
        "import adaptkit.cli.main, transformers.modeling_utils\n"
        f"assert '{INSIDE}' in sys.modules\n"
        "assert not any(type(finder).__module__.startswith('adaptkit') for finder in sys.meta_path)\n",
        begin="",
    )


def test_postponing_twice_is_postponing_once():
    run("before = list(sys.meta_path); postpone_compiler(); assert sys.meta_path == before")
