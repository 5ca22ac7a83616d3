"""Products with experts unpacked one by one have the bits of ``grouped_mm``, and need memory for one matrix."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adaptkit.models.activations import Alive
from adaptkit.training.network.routed import RoutedStack
from adaptkit.training.network.stack_lora import StackLora, StackWithLora

EXPERTS, ROWS, COLUMNS, RANK = 16, 48, 32, 4
ENDS = [0, 5, 5, 6, 40, 40, 43, 43, 43, 50, 51, 51, 51, 51, 59, 60]


def made(dtype, is_swapped, is_changed):
    """Return a stack, its LoRA, tokens and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(EXPERTS, ROWS, COLUMNS, generator=generator).to(dtype)
    out, into = (ROWS, COLUMNS) if is_swapped else (COLUMNS, ROWS)
    lora_a, lora_b = (torch.randn(EXPERTS, *shape, generator=generator) for shape in ((RANK, into), (out, RANK)))
    change = StackLora(lora_a, lora_b, 0.5, transposed=not is_swapped) if is_changed else None
    x, grad = (torch.randn(ENDS[-1], size, generator=generator).to(dtype) for size in (into, out))
    return stack, change, x, grad


def routed(stack, change, written=None):
    def write(expert, target):
        target.copy_(stack[expert])
        if written is not None:
            written.append(expert)

    return RoutedStack(tuple(stack.shape), stack.dtype, write, change)


def passes(operand, is_swapped, change, x, grad):
    """Return the product, and the gradients of the tokens and of A and B."""
    x = x.detach().requires_grad_()
    right = operand.transpose(-2, -1) if is_swapped else operand
    multiply = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm  # torch 2.9
    y = multiply(x, right, offs=torch.tensor(ENDS, dtype=torch.int32))
    factors = () if change is None else (change.lora_a, change.lora_b)
    return y.detach(), *torch.autograd.grad(y, [x, *factors], grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("is_changed", [False, True])
def test_results_and_gradients_have_the_bits_of_grouped_mm(dtype, is_swapped, is_changed):
    stack, change, x, grad = made(dtype, is_swapped, is_changed)
    whole = stack
    if change is not None:
        unpack = lambda: change.add_to(stack, torch.empty_like(stack))  # noqa: E731
        whole = StackWithLora.apply(change.lora_a, change.lora_b, change, unpack)
    expected = passes(whole, is_swapped, change, x, grad)
    found = passes(routed(stack, change), is_swapped, change, x, grad)
    assert len(found) == (4 if is_changed else 2)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
        assert one.dtype == two.dtype


def test_only_experts_with_tokens_are_written_and_in_order():
    stack, change, x, grad = made(torch.float32, True, True)
    written = []
    passes(routed(stack, change, written), True, change, x, grad)
    used = [expert for expert, end in enumerate(ENDS) if end > (ENDS[expert - 1] if expert else 0)]
    assert len(used) == 8
    assert written == [*used, *used]


class Products(TorchDispatchMode):
    """Records the rows of every product."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.out:
            self.rows.append(len(args[0]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_in_bfloat16_have_few_numbers_of_rows(dtype):
    """Groups of 5, 1, 34, 3, 7, 1, 8 and 1 tokens, of which the last but one has too few after it."""
    stack, change, x, grad = made(dtype, True, False)
    with Products() as products:
        passes(routed(stack, change), True, change, x, grad)
    one = [16, 1, 48, 16, 16, 1, 8, 1] if dtype == torch.bfloat16 else [5, 1, 34, 3, 7, 1, 8, 1]
    assert products.rows == [*one, *one]


@pytest.mark.parametrize("is_changed", [False, True])
def test_both_passes_need_memory_for_a_single_matrix(is_changed):
    stack, change, x, grad = made(torch.float32, True, is_changed)
    with Alive([stack, x, grad]) as alive:
        passes(routed(stack, change), True, change, x, grad)
    results = ENDS[-1] * (ROWS + 2 * COLUMNS) + 2 * EXPERTS * RANK * (ROWS + COLUMNS) * is_changed
    assert alive.peak < 4 * (results + 3 * ROWS * COLUMNS) < stack.nbytes


def test_other_functions_refuse_the_operand():
    stack, change, x, _ = made(torch.float32, False, False)
    with pytest.raises(TypeError):
        torch.matmul(x, routed(stack, change))
