"""Kernels: their arguments and results, where they are cached, and when they are compiled again."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
import pytest
import torch
from forks import Forks

import adaptkit
from adaptkit.compiled import Kernel, jit
from adaptkit.compiler import _register_with_numba, compile_kernel
from adaptkit.kernel_arguments import Known
from adaptkit.numerics.kernels._cpu_instructions import wide

DECODE = """
import sys
import numpy as np
from adaptkit.numerics.kernels import _cpu_blocks
out = np.zeros(4, np.uint32)
_cpu_blocks._decode_8bit(np.array([127, -127, 0, 127], np.int8), np.ones(1, np.float32), 4, out)
print(out.view(np.float32).tolist(), "compiled" if "numba" in sys.modules else "kept")
"""
MADE, KEPT = "[1.0, -1.0, 0.0, 1.0] compiled", "[1.0, -1.0, 0.0, 1.0] kept"


def copy_package(target):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(adaptkit.__file__).parent, target / "adaptkit", ignore=ignored)
    return target


@pytest.fixture
def package(tmp_path):
    return copy_package(tmp_path)


@pytest.fixture(scope="module")
def forks():
    """Forks in which numba appears not to be loaded, but importing it takes no time."""
    with Forks("import llvmlite.binding, numpy; from hidden import hide; hide('numba')") as run:
        yield run


@pytest.fixture(scope="module")
def decode(forks):
    """Decode four weights in a process that uses the package in a folder; return what it prints."""

    def run(root, code=DECODE, **environment):
        environment = {"ADAPTKIT_CACHE": str(root / "cache"), "PYTHONPATH": str(root), **environment}
        if any(name.startswith("NUMBA_") for name in environment) or (root / ".numba_config.yaml").exists():
            command, variables = [sys.executable, "-c", code], os.environ | environment  # read by numba's import
            done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True)
        else:
            done = forks(f"import os\nos.chdir({str(root)!r})\n{code}", **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture(scope="module")
def decoded_once(decode, tmp_path_factory):
    root = copy_package(tmp_path_factory.mktemp("decoded"))
    assert decode(root) == MADE
    return root


@pytest.fixture
def decoded(decoded_once, tmp_path):
    """A package whose kernel has been compiled."""
    return Path(shutil.copytree(decoded_once, tmp_path, dirs_exist_ok=True))


Pair = namedtuple("Pair", "one other")


@jit
def take_everything(array, wide_one, number, real, flag, single, byte, nothing, pair, out):
    total = array[0, 1] + wide_one[1, 0] + number + real + single + byte + pair.one[0] + pair.other
    out[0] = total if flag and nothing is None else -total
    return number + 1, real * 2, flag, single, byte


def test_arguments_and_results_of_every_kind_are_passed():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    columns = np.arange(8.0).reshape(2, 4).T[::2]  # both axes are strided
    out = np.zeros(1)
    pair = Pair(np.array([1000], np.int64), 10000)
    for array_of in (array, np.asfortranarray(array), array[:, ::-1][:, ::-1], array.astype(np.int16)):
        for flag in (True, False):
            found = take_everything(
                array_of, columns, 5, 0.25, flag, np.float32(0.5), np.uint8(200), None, pair, out
            )  # fmt: skip
            assert found == (6, 0.5, flag, 0.5, 200)
            assert [type(part) for part in found] == [int, float, bool, float, int]
            assert out[0] == (1 if flag else -1) * (1 + 2 + 5 + 0.25 + 0.5 + 200 + 1000 + 10000)


@jit
def copy_column(array, out):
    column = array[:, 1]
    for i in range(column.size):
        out[i] = column[i]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_columns_are_read_by_the_strides_of_an_array(dtype):
    array, out = np.arange(15, dtype=dtype).reshape(5, 3), np.zeros(5)
    for given in (array, np.asfortranarray(array), array[::-1]):
        copy_column(given, out)
        assert (out == given[:, 1]).all()


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64", "bfloat16", "float16"])
def test_tensors_are_arrays_with_their_shape_and_strides(dtype):
    """Short floats are passed as bits."""
    tensor = torch.arange(15).to(getattr(torch, dtype)).reshape(5, 3)
    bits = tensor.view({"bfloat16": torch.uint16, "float16": torch.int16}.get(dtype, tensor.dtype))
    for change in (lambda x: x, lambda x: x.T.contiguous().T, lambda x: x[::2], lambda x: x[:, 1:], lambda x: x[1:]):
        given, out = change(tensor), np.full(6, -1.0)
        copy_column(given, out)
        assert out.tolist() == [*change(bits)[:, 1].tolist(), *[-1.0] * (6 - len(given))]


def test_tensors_are_written_and_may_be_parts_of_tuples():
    array, out = torch.arange(6.0).reshape(2, 3).T, torch.zeros(1, dtype=torch.float64, requires_grad=True)
    columns = torch.arange(8.0).reshape(2, 4).T[::2]
    pair = Pair(torch.tensor([1000]), 10000)
    for given in (pair, Known(pair), deepcopy(Known(pair))):
        out.detach().zero_()
        take_everything(array, columns, 5, 0.25, True, np.float32(0.5), np.uint8(200), None, given, out)
        assert out.item() == 3 + 2 + 5 + 0.25 + 0.5 + 200 + 1000 + 10000


def test_a_copy_of_a_known_argument_is_of_the_copied_arrays():
    """Cells hold addresses: those of the original may be freed."""
    known, out = Known(Pair(np.array([1000]), 10000)), np.zeros(1)
    copied = deepcopy(known)
    known.argument.one[0] = 0
    one = np.zeros((1, 2), np.float32), np.zeros((2, 1))
    take_everything(*one, 0, 0.0, True, np.float32(0), np.uint8(0), None, copied, out)
    assert out[0] == 11000


def test_tensors_without_memory_on_the_cpu_are_refused():
    for tensor in (torch.empty(3, device="meta"), torch.ones(3).to_sparse()):
        with pytest.raises((TypeError, RuntimeError)):
            first_of(tensor)


def test_unaligned_arrays_are_read():
    whole = np.arange(41, dtype=np.uint8)
    crooked = whole[1:].view(np.float32)
    assert not crooked.flags.aligned
    assert first_of(crooked) == first_of(torch.frombuffer(whole.data, dtype=torch.float32, offset=1)) == crooked[0]


@jit
def first_of(array):
    return array[0]


@jit
def put_nine(array):
    array[0] = 9


def test_read_only_arrays_cannot_be_written():
    """Writing to a mapped file would crash the process; constant bytes would change."""
    content = b"\x01" * 8
    constant = np.frombuffer(content, np.int64)
    with pytest.raises(numba.NumbaError, match="Cannot modify readonly array"):
        put_nine(constant)
    assert content == b"\x01" * 8
    assert first_of(constant) == 0x0101010101010101
    array = constant.copy()
    put_nine(array)
    assert array[0] == first_of(array) == 9


def test_an_argument_of_an_unsupported_type_is_refused():
    with pytest.raises(TypeError):
        first_of([1.0])


def test_a_kernel_that_needs_numba_when_it_runs_is_refused():
    """A process that has not loaded numba could not run it from the cache, so it is refused when compiled."""

    def needs(array):
        made = np.empty(3)
        made[0] = array[0]
        return made[0]

    with pytest.raises(numba.NumbaError, match="Only accept returning of array"):
        compile_kernel(Kernel(needs, {}), ((np.dtype("int64"), 1, 0x501),))


LARGE = np.arange(200_000.0)
absolute = ctypes.CDLL(None).labs if sys.platform != "win32" else ctypes.CDLL("msvcrt").labs
absolute.argtypes, absolute.restype = [ctypes.c_long], ctypes.c_long


def of_a_table(i):
    return LARGE[i]


def by_a_pointer(i):
    return absolute(i)


@pytest.mark.parametrize("function", [of_a_table, by_a_pointer])
def test_a_kernel_with_addresses_of_its_process_is_refused(function):
    """They differ in the next process; numba embeds them for large arrays and for functions of ctypes."""
    with pytest.raises(SystemError, match="addresses of this process"):
        compile_kernel(Kernel(function, {}), ("q",))


def test_threads_that_call_a_new_kernel_at_once_compile_it_once(monkeypatch):
    import adaptkit.compiler

    calls = []

    def counted(kernel, kinds):
        calls.append(kinds)
        return compile_kernel(kernel, kinds)

    monkeypatch.setattr(adaptkit.compiler, "compile_kernel", counted)

    @jit
    def double(array):
        for i in range(array.size):
            array[i] *= 2

    arrays = [np.full(1000, float(n)) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(double, arrays))
    assert len(calls) == 1
    assert all((array == 2 * n).all() for n, array in enumerate(arrays))


def test_a_kernel_is_cached_until_a_function_that_it_calls_changes(decode, package):
    """As when a new version is installed over an old one."""
    assert decode(package) == MADE
    assert decode(package) == KEPT
    called = package / "adaptkit" / "numerics" / "kernels" / "_cpu_float.py"
    text = called.read_text()
    as_it_is = "lambda array, number: np.float32(number).view(np.uint32)"
    assert as_it_is in text
    called.write_text(text.replace(as_it_is, as_it_is.replace("(number)", "(number * 2)")))
    assert decode(package) == "[2.0, -2.0, 0.0, 2.0] compiled"
    assert decode(package) == "[2.0, -2.0, 0.0, 2.0] kept"


WAITING = DECODE.replace("out = np.zeros", "print(flush=True); sys.stdin.readline()\nout = np.zeros")


@contextmanager
def process_before(root):
    """A process that has imported the package, and decodes when the block ends."""
    environment = {**os.environ, "ADAPTKIT_CACHE": "", "PYTHONPATH": str(root)}
    command, pipe = [sys.executable, "-c", WAITING], subprocess.PIPE
    with subprocess.Popen(command, cwd=root, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        process.stdout.readline()
        said = []
        yield said
        said.append(process.communicate("\n")[0].strip())


def install_another(package):
    """Install a version that decodes to twice the values."""
    called = package / "adaptkit" / "numerics" / "kernels" / "_cpu_float.py"
    as_it_is = "lambda array, number: np.float32(number).view(np.uint32)"
    called.write_text(called.read_text().replace(as_it_is, as_it_is.replace("(number)", "(number * 2)")))


GATES = """
import hashlib
import sys
import numpy as np
from adaptkit.numerics.kernels import _cpu_attention, _cpu_layers
def attend():
    scores, room = np.ones((2, 8), np.uint16), np.zeros((1, 8), np.float32)
    span = np.zeros(2, np.int32), np.full(2, 8, np.int32)
    _cpu_attention.softmax_block(scores, *span, np.float32(1), np.zeros(2, np.float32), room)
def gates():
    gate, up, grad = np.random.default_rng(0).normal(size=(3, 1 << 16)).astype(np.float32)
    bits = [side.view(np.uint32) for side in (gate, up, grad, np.zeros_like(gate), np.zeros_like(gate))]
    _cpu_layers.gate_backward(*bits)
    return hashlib.sha256(bits[3].tobytes() + bits[4].tobytes()).hexdigest()
if sys.argv[1] == "after":
    attend()
print(gates(), "compiled" if "numba" in sys.modules else "kept")
"""


def test_the_bits_of_a_kernel_do_not_depend_on_what_was_compiled_before_it(decode, package):
    """Such as kernels with sums that may be reordered, which call the same functions."""
    found = []
    for order in ("alone", "after"):
        shutil.rmtree(package / "adaptkit/numerics/kernels/__pycache__", ignore_errors=True)
        found.append(decode(package, f"import sys; sys.argv = ['', '{order}']" + GATES))
    assert found[0] == found[1]
    assert found[0].endswith(" compiled")


def test_a_process_older_than_an_installation_caches_no_kernel_for_the_new_version(decode, package):
    with process_before(package) as said:
        install_another(package)
    assert said == [MADE]
    assert decode(package) == "[2.0, -2.0, 0.0, 2.0] compiled"


def test_a_process_older_than_an_installation_runs_no_kernel_of_the_new_version(decode, package):
    with process_before(package) as said:
        install_another(package)
        assert decode(package) == "[2.0, -2.0, 0.0, 2.0] compiled"
    assert said == [MADE]
    assert decode(package) == "[2.0, -2.0, 0.0, 2.0] kept"


def test_an_editors_lock_file_next_to_the_sources_is_ignored(decode, decoded):
    (decoded / "adaptkit" / "numerics" / "kernels" / ".#_cpu_float.py").symlink_to("somebody@somewhere.1:2")
    assert decode(decoded) == KEPT


@pytest.mark.parametrize("form", ["archive", "bytecode"])
def test_a_package_without_readable_sources_works_and_caches_nothing(form, package):
    if form == "archive":
        shutil.make_archive(str(package / "packed"), "zip", package, "adaptkit")
        where = package / "packed.zip"
    else:
        subprocess.run([sys.executable, "-m", "compileall", "-q", "-b", package / "adaptkit"], check=True)
        for path in (package / "adaptkit").rglob("*.py"):
            path.unlink()
        where = package
    elsewhere = package / "elsewhere"
    elsewhere.mkdir()
    command, environment = [sys.executable, "-c", DECODE], {**os.environ, "PYTHONPATH": str(where)}
    run = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == MADE, run.stderr
    assert not list(package.rglob("*.o"))


@pytest.mark.parametrize(
    "left", [lambda whole: b"", lambda whole: b"half", lambda whole: whole[:-1], lambda whole: whole[:-9] + b"\0" * 9,
             lambda whole: whole[: len(whole) // 2] + bytes(16) + whole[len(whole) // 2 + 16 :]]
)  # fmt: skip
def test_a_damaged_cache_file_is_compiled_again(decode, left, decoded):
    """A power cut may leave one; without a check, machine code with zeros in it would be run."""
    kept = sorted(decoded.rglob("*.o"))
    assert kept
    for path in kept:
        path.write_bytes(left(path.read_bytes()))
    assert decode(decoded) == MADE
    assert decode(decoded) == KEPT


def test_an_interrupted_compilation_can_be_repeated(decode, package):
    """Also if it was interrupted while functions were registered with numba, as in a notebook."""
    code = (
        "from adaptkit import compiler\n"
        "def interrupted(of, **options):\n"
        "    if of.__name__ != 'rounded': return original(of, **options)\n"
        "    compiler.overload = original; raise KeyboardInterrupt\n"
        "original, compiler.overload = compiler.overload, interrupted\n"
        f"try:{DECODE.replace(chr(10), chr(10) + '    ')}\n"
        f"except KeyboardInterrupt: pass\n{DECODE}"
    )
    assert decode(package, code) == MADE


def test_a_cached_kernel_under_the_name_of_a_different_one_is_not_used(decode, decoded):
    """The contents of two cache files are exchanged."""
    ones = DECODE.replace("np.ones(1, np.float32), 4, out)", "np.ones(1, np.float32), 4, out.view(np.uint16)[:4])")
    assert decode(decoded, ones).endswith("compiled")
    one, other = sorted(decoded.rglob("*.o"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert decode(decoded) == MADE


SEVERAL_OF_ONE_NAME = """
import numpy as np
from adaptkit.compiled import compiled, jit

def times(factor):
    @jit
    def scale(x):
        return x * factor
    return scale

def total(x):
    found = np.float32(0)
    for i in range(x.size):
        found += x[i]
    return found

as_it_is, in_any_order = jit(total), compiled(fastmath=True)(total)

@jit
def first(x):
    return x[0].a
"""


def test_kernels_with_the_same_name_and_sizes_of_arguments_are_distinguished(decode, package):
    (package / "adaptkit" / "numerics" / "kernels" / "_several.py").write_text(SEVERAL_OF_ONE_NAME)
    code = (
        "import numpy as np; from adaptkit.numerics.kernels import _several as k\n"
        "x = np.array([1e8, 1, -1e8, 1] * 16, np.float32)\n"
        "ab, ba = ([(name, np.int32) for name in names] for names in ('ab', 'ba'))\n"
        "print(k.times(2.0)(1.0), k.times(3.0)(1.0), [k.first(np.array([(1, 2)], kind)) for kind in (ab, ba)],"
        " k.as_it_is(x), k.in_any_order(x) != k.as_it_is(x))"
    )
    for _ in range(2):
        assert decode(package, code) == "2.0 3.0 [1, 2] 1.0 True"


def test_a_full_disk_only_prevents_caching(decode, package):
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
    assert decode(package, full + DECODE) == MADE
    assert not list(package.rglob("*.o*"))
    assert decode(package) == MADE


def test_disabled_compilation_is_refused_with_a_hint(decode, package):
    code = f"from adaptkit.errors import UsageError\ntry:{DECODE.replace(chr(10), chr(10) + '    ')}\n"
    code += "except UsageError as error: print(error.hint)"
    assert decode(package, code, NUMBA_DISABLE_JIT="1") == "unset NUMBA_DISABLE_JIT"


def test_kernels_are_cached_in_the_users_folder_if_the_package_is_not_writable(decode, package):
    where = package / "adaptkit" / "numerics" / "kernels" / "__pycache__"
    where.write_text("no folder")  # root cannot write into it, either
    assert decode(package) == MADE
    assert decode(package) == KEPT
    assert list((package / "cache" / "kernels").glob("*.o"))
    for _ in range(2):
        assert decode(package, ADAPTKIT_CACHE="") == MADE


def test_kernels_work_with_vector_instructions_disabled_in_numba(decode, package):
    code = """
import numpy as np
from adaptkit.formats.nf4 import FORMAT
print(FORMAT.quantize(np.ones(64)).codes[0])
"""
    assert decode(package, code) == "255"
    assert decode(package, code, NUMBA_ENABLE_AVX="0") == "255"
    assert decode(package, code, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == "255"


@pytest.mark.skipif(not llvmlite.binding.get_host_cpu_features().get("avx512f"), reason="this processor lacks AVX-512")
@pytest.mark.parametrize("line", ["cpu_name: generic", "cpu_features: ''", "enable_avx: 0"])
def test_a_numba_file_that_sets_a_different_processor_is_refused(decode, line, package):
    """This processor's instructions would be requested for that one, at which LLVM ends the process."""
    (package / ".numba_config.yaml").write_text(f"{line}\n")
    code = f"from adaptkit.errors import UsageError\ntry:{DECODE.replace(chr(10), chr(10) + '    ')}\n"
    assert "in the environment" in decode(package, code + "except UsageError as error: print(error.hint)")


def test_kernels_for_different_processors_are_cached_separately(decode, decoded):
    """As where machines of several kinds share a disk; numba's number of threads makes no difference."""
    assert decode(decoded, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == MADE
    assert decode(decoded) == KEPT
    assert decode(decoded, NUMBA_NUM_THREADS="1") == KEPT


def test_kernels_for_pythons_with_different_object_headers_are_cached_separately(decode, decoded):
    """Their code contains the offsets of an array's fields; free-threaded Python has longer object headers."""
    other = "import adaptkit.kernel_cache as k, types; k.object = types.SimpleNamespace(__basicsize__=32)\n" + DECODE
    assert decode(decoded, other) == MADE
    assert [decode(decoded), decode(decoded, other)] == [KEPT, KEPT]


def add(x, y):
    wide()
    for i in range(x.size):
        x[i] += y[i]


@pytest.mark.skipif(not llvmlite.binding.get_host_cpu_features().get("avx512f"), reason="this processor lacks AVX-512")
def test_wide_vectors_are_used_where_requested():
    """Registers of 64 bytes are called zmm."""
    _register_with_numba()
    kernel = numba.njit(add)
    kernel(np.zeros(64, np.float32), np.zeros(64, np.float32))
    (text,) = kernel.inspect_asm().values()
    assert "zmm" in text
