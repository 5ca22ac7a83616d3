"""torch's compiler is left out until code uses it, and then works as usual.

Most tests run in a process of their own, since a process loads a module only once.
"""

import pytest
from forks import Forks

INSIDE = "torch._dynamo.convert_frame"
BEGIN = "from adaptkit.torch_compiler import leave_compiler_out; leave_compiler_out()"
MODEL = """
import torch, transformers
config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, vocab_size=64)
model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(8)[None]
"""


@pytest.fixture(scope="module")
def run():
    """Run code in a process that has loaded what transformers imports before the compiler."""
    imports = "import torch.distributed.tensor, transformers.models.auto.configuration_auto, accelerate, sys"
    with Forks(f"{imports}; assert 'torch._dynamo' not in sys.modules") as forks:
        yield lambda code, begin=BEGIN: succeeds(forks(f"import sys\n{begin}\n{code}"))


def succeeds(done):
    assert done.returncode == 0, done.stderr


def arguments(command, llama, instructions, tmp_path):
    return {
        "train": ["train", "--base", llama, "--data", instructions, "-o", tmp_path / "out", "--steps", "1"],
        "evaluate": ["evaluate", "--base", llama, "--data", instructions, "--prompt", "a"],
        "quantize": ["quantize", llama, "-o", tmp_path / "out", "--calibrate", instructions],
        "plan": ["plan", llama, "--device", "cpu"],
    }[command]


@pytest.mark.parametrize("command", ["train", "evaluate", "quantize", "plan"])
def test_commands_that_compute_with_models_load_no_compiler(run_cli, command, llama, instructions, tmp_path):
    done = run_cli(*arguments(command, llama, instructions, tmp_path), PYTHONPROFILEIMPORTTIME="1")
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.code == 0, done.stderr
    assert {"torch", "transformers.modeling_utils"} <= loaded
    assert not any(name.startswith("torch._dynamo") for name in loaded)


def test_a_model_computes_without_the_compiler(run):
    run(f"{MODEL}\nmodel(ids).logits.sum().backward()\nassert '{INSIDE}' not in sys.modules")


def test_without_leave_compiler_out_transformers_loads_the_compiler(run):
    run(f"import transformers.modeling_utils; assert '{INSIDE}' in sys.modules", begin="")


@pytest.mark.parametrize(
    "use",
    [
        "import torch._dynamo; torch._dynamo.reset()",
        "import torch; torch._dynamo.reset()",
        "import torch; torch._dynamo.config.suppress_errors",
        "from torch import _dynamo; _dynamo.reset()",
        "from torch._dynamo import reset; reset()",
        "import torch; assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2)).tolist() == [2, 2]",
    ],
)
def test_code_that_uses_the_compiler_loads_it(run, use):
    run(
        f"import transformers.modeling_utils\nassert '{INSIDE}' not in sys.modules\n{use}\n"
        f"import torch; assert '{INSIDE}' in sys.modules and torch._dynamo is sys.modules['torch._dynamo']"
    )


@pytest.mark.parametrize("name", ["config", "exc", "utils", "eval_frame", "_trace_wrapped_higher_order_op"])
def test_each_module_of_the_compiler_exists_once(run, name):
    """Whichever of them is imported first, the compiler's own modules use the same one."""
    run(
        f"import transformers.modeling_utils\nimport torch._dynamo.{name} as mine\nimport torch, gc, types\n"
        "torch._dynamo.reset()\n"
        f"full = 'torch._dynamo.{name}'\nassert sys.modules[full] is mine\n"
        "of = [m for m in gc.get_objects() if isinstance(m, types.ModuleType) and m.__dict__.get('__name__') == full]\n"
        "assert len(of) == 1, of\n"
    )


def test_a_compiled_model_computes_the_same(run):
    run(
        f"{MODEL}\ncompiled = torch.compile(model, backend='eager')\n"
        "assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)\n"
        "assert torch._dynamo.utils.counters['frames']['ok'] > 0\n"
    )


def test_an_exported_model_computes_the_same(run):
    run(
        "import torch\n"
        "layer, x = torch.nn.Linear(3, 2), torch.ones(1, 3)\n"
        "assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))\n"
    )


def test_decorators_have_no_effect_until_the_compiler_is_loaded(run):
    run(
        "import torch\n"
        "def f(): return 1\n"
        "for marks in (torch.compiler, torch._dynamo):\n"
        "    assert marks.disable(f) is f and marks.disable(recursive=False)(f) is f\n"
        "    assert marks.assume_constant_result(f) is f and marks.allow_in_graph(f) is f\n"
        f"assert '{INSIDE}' not in sys.modules\n"
        "early = torch.compiler.disable\n"
        "torch._dynamo.reset()\n"
        "for mark in (early, torch.compiler.disable, torch._dynamo.disable):\n"
        "    assert mark(f) is not f and mark(f)() == 1 and mark(recursive=False)(f) is not None\n"
        "    assert getattr(mark(f), '_torchdynamo_disable', False)\n"
    )


def test_threads_that_load_the_compiler_at_once_all_get_the_complete_module(run):
    run(
        "import threading, torch\n"
        "gate, seen = threading.Barrier(8), []\n"
        "def attribute(): seen.append(torch._dynamo.optimize)\n"
        "def module():\n"
        "    from torch._dynamo.eval_frame import optimize\n"
        "    seen.append(optimize)\n"
        "def at_once(work):\n"
        "    gate.wait()\n"
        "    work()\n"
        "threads = [threading.Thread(target=at_once, args=(work,)) for work in [attribute, module] * 4]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "assert len(seen) == 8 and len(set(seen)) == 1\n"
    )


def test_importing_adaptkit_as_a_library_does_not_change_torch(run):
    run(f"import adaptkit.cli.main, transformers.modeling_utils; assert '{INSIDE}' in sys.modules", begin="")


def test_leaving_the_compiler_out_twice_or_too_late_has_no_effect(run):
    run("import torch; mark = torch.compiler.disable; leave_compiler_out(); assert torch.compiler.disable is mark")
    run(
        "import torch._dynamo\n"
        "mark = torch.compiler.disable\n"
        "from adaptkit.torch_compiler import leave_compiler_out; leave_compiler_out()\n"
        "assert torch.compiler.disable is mark and torch._dynamo is sys.modules['torch._dynamo']\n",
        begin="",
    )


WINDOW = "import torch\nfrom adaptkit.torch_compiler import without_compiler\n"


def test_without_compiler_keeps_the_meta_device_from_loading_it(run):
    run(
        f"{WINDOW}with without_compiler(), torch.device('meta'):\n"
        "    x = torch.nn.Linear(3, 3)(1.0 / torch.arange(3, dtype=torch.float))\n"
        f"assert x.is_meta and 'torch._dynamo' not in sys.modules and '{INSIDE}' not in sys.modules\n"
    )
    run(f"{WINDOW}torch.arange(3.0, device='meta') + 1\nassert '{INSIDE}' in sys.modules")


@pytest.mark.parametrize(
    "use",
    [
        "torch._dynamo.reset()",
        "torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2))",
        "import torch._dynamo.utils; torch._dynamo.utils.counters",
        "raise ValueError",
    ],
)
def test_the_compiler_can_be_used_inside_and_after_without_compiler(run, use):
    run(
        f"{WINDOW}try:\n    with without_compiler():\n        {use}\nexcept ValueError: pass\n"
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2)).tolist() == [2, 2]\n"
        "assert torch._dynamo is sys.modules['torch._dynamo'] and torch._dynamo.utils.counters['frames']['ok'] > 0\n"
        "from torch._dynamo import convert_frame, utils\n"
        "assert convert_frame.counters is utils.counters is sys.modules['torch._dynamo.utils'].counters\n"
        "assert utils.__spec__.loader is utils.__loader__ and utils.__spec__.origin == utils.__file__\n"
    )


def test_without_compiler_has_no_effect_if_the_compiler_is_not_left_out(run):
    run(
        f"{WINDOW}with without_compiler():\n    assert 'torch._dynamo' not in sys.modules\n"
        f"    torch.arange(3.0, device='meta') + 1\nassert '{INSIDE}' in sys.modules\n",
        begin="",
    )


def test_a_sharded_base_loads_the_compiler_before_memory_is_measured(run, llama):
    code = (
        "import torch\nfrom pathlib import Path\nfrom adaptkit.training.preparation import begin_libraries\n"
        f"begin_libraries(Path({str(llama)!r}), torch.device('cpu'), shard_base={{}})\n"
        f"assert ('{INSIDE}' in sys.modules) == {{}}"
    )
    run(code.format(True, True))
    run(code.format(False, False))
