"""Loss and gradients are those of plain cross-entropy, without the full matrix of logits."""

from dataclasses import replace

import pytest
import tiny
import torch
from adapted import load_adapted
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from adaptkit.data.batches import Batch
from adaptkit.data.encoding import IGNORED
from adaptkit.models import memory
from adaptkit.models.activations import Alive, Checkpointing
from adaptkit.models.memory import head_gradient_bytes
from adaptkit.training.memory.segments import checkpoint_layers
from adaptkit.training.network import loss, whole
from adaptkit.training.network.adapt import train_whole
from adaptkit.training.network.loss import cross_entropy, summed_loss
from adaptkit.training.network.model import load_model
from adaptkit.training.network.new_adapters import AdapterShape, new_adapter

VOCABULARY = 320


def batch_of(lengths, vocabulary):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocabulary, (len(lengths), max(lengths)), generator=generator)
    labels, mask = ids.clone(), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        labels[row, : length // 3] = labels[row, length:] = -100
    return Batch(ids, labels, mask)


def plain_loss(model, batch):
    """Return the loss of the network's full logits, with padding masked, computed in float64."""
    logits = model.network(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1].double()
    flat = logits.reshape(-1, logits.shape[-1])
    return functional.cross_entropy(flat, batch.labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")


def gradients(model, value):
    trained = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(value, trained.values()), strict=True))


def loaded(folder, whole=()):
    model = load_adapted(folder)
    for part in whole:
        model.network.get_submodule(part).requires_grad_()
    return model


@pytest.fixture(scope="module")
def families(made):
    found = {name: tiny.write_family(made / f"loss-{name}", name) for name in ("phi", "qwen3_moe")}
    return found | {"gpt2": tiny.write_gpt2(made / "loss-gpt2")}


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("family", ["llama", "phi", "gpt2", "qwen3_moe"])
def test_loss_and_gradients_are_those_of_the_full_matrix_of_logits(family, rows, families, llama, monkeypatch):
    """Covers a tied head, a head with a bias, and experts; in one chunk and in many."""
    monkeypatch.setattr(loss, "rows_at_a_time", lambda *_: rows)
    monkeypatch.setattr(loss, "_BLOCK_BYTES", 4 * 3 * VOCABULARY)
    model = loaded(families.get(family, llama))
    batch = batch_of((20, 13, 7), model.network.config.vocab_size)
    expected = plain_loss(model, batch)
    value = summed_loss(model, batch)
    assert model.output_layer.is_head
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    found, wanted = gradients(model, value / 7), gradients(model, expected / 7)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient.float(), rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_a_trained_output_layer_gets_its_gradient(families, monkeypatch):
    monkeypatch.setattr(loss, "rows_at_a_time", lambda *_: 4)
    model = loaded(families["phi"], whole=("lm_head",))
    batch = batch_of((20, 13), model.network.config.vocab_size)
    found, wanted = (gradients(model, way(model, batch)) for way in (summed_loss, plain_loss))
    assert {"lm_head.weight", "lm_head.bias"} <= set(found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient.float(), rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("share", [1.0, 1 / 7])
def test_a_trained_output_layer_with_a_gradient_adds_its_share_to_it(families, share, monkeypatch):
    """All others get theirs from the backward pass, which multiplies by the share, too."""
    monkeypatch.setattr(loss, "rows_at_a_time", lambda *_: 4)
    model = load_adapted(families["phi"])
    train_whole(model, {"lm_head.weight", "lm_head.bias"})
    batch = batch_of((20, 13), model.network.config.vocab_size)
    wanted = gradients(model, plain_loss(model, batch) * share)
    for name, parameter in model.network.named_parameters():
        parameter.grad = torch.zeros_like(parameter) if name in wanted else None
    (summed_loss(model, batch, share) * share).backward()
    for name, gradient in wanted.items():
        found = model.network.get_parameter(name).grad
        torch.testing.assert_close(found, gradient.float(), rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_an_output_layer_may_return_logits_that_are_not_contiguous(llama, monkeypatch):
    model = loaded(llama)
    batch = batch_of((20, 13), model.network.config.vocab_size)
    expected = gradients(model, plain_loss(model, batch))
    model.network.lm_head.register_forward_hook(lambda head, args, y: y.T.contiguous().T if y.dim() == 2 else y)
    for name, gradient in gradients(model, summed_loss(model, batch)).items():
        torch.testing.assert_close(gradient, expected[name].float(), rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_a_batch_without_loss_adds_nothing_to_the_gradient_of_a_trained_output_layer(families):
    """Training with several processes gives such a batch to a process that has no rows in a step."""
    model = loaded(families["phi"], whole=("lm_head",))
    batch = batch_of((20, 13), model.network.config.vocab_size)
    for parameter in model.network.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    summed_loss(model, replace(batch, labels=torch.full_like(batch.ids, IGNORED))).backward()
    found = {name: p.grad for name, p in model.network.named_parameters() if p.requires_grad}
    assert {"lm_head.weight", "lm_head.bias"} <= set(found)
    assert all((gradient == 1).all() for gradient in found.values())


def test_without_gradients_the_loss_has_the_same_bits_and_no_graph(llama):
    model = loaded(llama)
    batch = batch_of((20, 13), model.network.config.vocab_size)
    with_gradients = summed_loss(model, batch)
    with torch.no_grad():
        without = summed_loss(model, batch)
    assert (with_gradients.requires_grad, without.requires_grad) == (True, False)
    assert torch.equal(without, with_gradients)


def family(made, name, **values):
    """Write a model of any family, with random weights; return its folder."""
    import transformers

    config = transformers.AutoConfig.for_model(name, **tiny._DECODER, vocab_size=VOCABULARY, pad_token_id=0, **values)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made / f"loss-{name}")
    return made / f"loss-{name}"


BOUNDED = {"gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0}, "granite": {"logits_scaling": 8.0},
           "cohere": {"logit_scale": 0.25}}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_logits_scaled_or_bounded_after_the_output_layer_are_computed_in_chunks_too(name, made, monkeypatch):
    monkeypatch.setattr(loss, "rows_at_a_time", lambda *_: 4)
    model = loaded(family(made, name, **BOUNDED[name]))
    assert not model.output_layer.is_head
    batch = batch_of((20, 13), VOCABULARY)
    with Largest(VOCABULARY) as seen:
        value = summed_loss(model, batch)
        found = gradients(model, value)
    assert seen.rows == 4
    expected = plain_loss(model, batch)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for key, gradient in gradients(model, expected).items():
        torch.testing.assert_close(found[key], gradient.float(), rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_a_network_that_bypasses_its_base_model_gets_its_loss_from_all_logits(made):
    model = loaded(family(made, "opt", ffn_dim=64, word_embed_proj_dim=64))
    assert model.output_layer is None
    batch = batch_of((20, 13), VOCABULARY)
    expected = plain_loss(model, batch)
    assert float(summed_loss(model, batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_computing_the_loss_does_not_synchronize_with_the_device(name, llama, made, monkeypatch):
    """Reading a value, which would synchronize with a GPU, fails for meta tensors.

    The exception is patched: transformers reads the positions, before the first layer, to see whether rows are packed.
    """
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    folder = llama if name == "llama" else family(made, name, **BOUNDED[name])
    model = load_model(folder, torch.bfloat16, torch.device("cpu"))
    new_adapter(model, ("*",), AdapterShape(4, 8.0), "normal", 0.1, 0)
    network = model.network.to("meta").train()
    checkpoint_layers(network, Checkpointing(2, 2))
    batch = batch_of((20, 13), network.config.vocab_size)
    summed_loss(model, batch).backward()
    assert all(p.grad.is_meta for p in network.parameters() if p.requires_grad)


class Largest(TorchDispatchMode):
    """Records the most rows of matrices with a column per vocabulary entry: of a single one, and of all that exist at a
    time. Transposes are not counted."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows, self.rows_alive, self._made = vocabulary, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_made = isinstance(result, torch.Tensor) and func is not torch.ops.aten.t.default
        if is_made and result.dim() == 2 and result.shape[-1] == self.vocabulary:
            self._made = {storage: rows for storage, rows in self._made.items() if not storage.expired()}
            storage = StorageWeakRef(result.untyped_storage())
            self._made[storage] = max(self._made.get(storage, 0), len(result))
            self.rows = max(self.rows, len(result))
            self.rows_alive = max(self.rows_alive, sum(self._made.values()))
        return result


def test_only_one_chunk_of_logits_exists_at_a_time_and_two_blocks_of_it_in_float32(llama, monkeypatch):
    monkeypatch.setattr(loss, "rows_at_a_time", lambda *_: 8)
    model = loaded(llama)
    monkeypatch.setattr(loss, "_BLOCK_BYTES", 4 * 2 * model.network.config.vocab_size)
    batch = batch_of((60, 60), model.network.config.vocab_size)
    with Largest(model.network.config.vocab_size) as seen:
        summed_loss(model, batch).backward()
    assert (seen.rows, seen.rows_alive) == (8, 8 + 2 * 2)


def test_float32_hidden_states_work_with_a_bfloat16_head(made):
    """Mamba's hidden states stay in float32."""
    folder = tiny.write_architecture(made / "loss-mamba", "mamba")
    model = load_model(folder, torch.bfloat16, torch.device("cpu"))
    assert model.output_layer.is_head
    batch = batch_of((20, 13), 300)
    found = float(summed_loss(model, batch).detach())
    exact = float(summed_loss(load_model(folder, torch.float32, torch.device("cpu")), batch).detach())
    assert found == pytest.approx(exact, rel=0.01)


def test_modules_between_the_hidden_states_and_the_head_are_run_too(made):
    """Electra's head reads narrower states, which a linear layer and a norm compute."""
    values = {"embedding_size": 32, "is_decoder": True}
    model = loaded(family(made, "electra", **values))
    assert not model.output_layer.is_head
    batch = batch_of((20, 13), VOCABULARY)
    expected = plain_loss(model, batch)
    assert float(summed_loss(model, batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "electra"])
def test_an_adapter_between_the_base_model_and_the_output_layer_gets_its_gradient(name, made):
    model = loaded(family(made, name, is_decoder=True))
    between = [n for n in model.adapted() if not n.startswith(f"{model.network.base_model_prefix}.")]
    factors = [factor for n in between for factor in (model.linears[n].lora_a, model.linears[n].lora_b)]
    assert factors
    batch = batch_of((20, 13), VOCABULARY)
    expected = torch.autograd.grad(plain_loss(model, batch), factors)
    found = torch.autograd.grad(summed_loss(model, batch), factors)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 5000)])
def test_logits_are_overwritten_with_the_gradient_of_their_loss(shape, dtype, monkeypatch):
    monkeypatch.setattr(loss, "_BLOCK_BYTES", 4 * 3 * VOCABULARY)
    generator = torch.Generator().manual_seed(2)
    logits = (6 * torch.randn(shape, generator=generator)).to(dtype)
    wanted = torch.randint(0, shape[1], shape[:1], generator=generator)
    exact = logits.double().requires_grad_()
    expected = functional.cross_entropy(exact, wanted, reduction="sum")
    expected.backward()
    before, value = logits.clone(), pytest.approx(float(expected.detach()), rel=1e-6, abs=1e-6)
    assert float(cross_entropy(logits, wanted, False)) == value
    assert torch.equal(logits, before)
    assert float(cross_entropy(logits, wanted, True)) == value
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), exact.grad, rtol=unit, atol=2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_nan_or_infinite_logit_makes_the_loss_nan_unless_it_is_minus_infinity(dtype):
    for bad, is_seen in ((float("nan"), True), (-float("nan"), True), (float("inf"), True), (-float("inf"), False)):
        logits = torch.randn(3, 40).to(dtype)
        logits[1, 7] = bad
        wanted = torch.tensor([1, 2, 3])
        expected = functional.cross_entropy(logits.double(), wanted, reduction="sum")
        found = cross_entropy(logits, wanted, True)
        assert bool(found.isnan()) == bool(expected.isnan()) == is_seen
        assert bool(logits[1].isnan().all()) == is_seen
        assert logits[0].isfinite().all()
        if not is_seen:
            assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_of_only_minus_infinity_has_neither_a_finite_loss_nor_a_finite_gradient(dtype):
    """As in torch. A target of minus infinity beside finite logits only makes the loss infinite."""
    for columns in (slice(None), 2, slice(0, 39)):
        logits = torch.randn(3, 40).to(dtype)
        logits[1, columns] = -float("inf")
        wanted = torch.tensor([1, 2, 3])
        exact = logits.double().requires_grad_()
        expected = functional.cross_entropy(exact, wanted, reduction="sum")
        expected.backward()
        found = cross_entropy(logits, wanted, True)
        assert torch.equal(found.double(), expected.detach()) or (found.isnan() and expected.isnan())
        assert torch.equal(logits.isfinite(), exact.grad.isfinite())


@pytest.mark.parametrize(("dtype", "chunks"), [("bfloat16", 4), ("float32", 4), ("bfloat16", 1)])
def test_a_trained_output_layer_takes_no_more_memory_than_is_predicted(families, monkeypatch, dtype, chunks):
    """Its gradients besides ``grad``: a copy in the compute dtype, and a block of the gradient of one chunk."""
    rows, compute = 4, getattr(torch, dtype)
    monkeypatch.setattr(loss, "rows_at_a_time", lambda *_: rows)
    for module in (whole, memory):
        monkeypatch.setattr(module, "GRADIENT_BLOCK_BYTES", 4096)
    model = load_model(families["phi"], compute, torch.device("cpu"))
    train_whole(model, {"lm_head.weight", "lm_head.bias"})
    head = model.network.lm_head
    hidden = torch.randn(rows * chunks, head.in_features, dtype=compute, requires_grad=True)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    known = [hidden, *head.parameters(), *(parameter.grad for parameter in trained)]
    with Alive(known) as alive:
        loss._Loss.apply(hidden, torch.arange(len(hidden)), model.output_layer, 1.0, *trained)
    assert all(parameter.grad.any() for parameter in trained if parameter.dim() == 2)
    beside = 2 * hidden.nbytes + rows * VOCABULARY * compute.itemsize
    predicted = head_gradient_bytes(sum(parameter.numel() for parameter in trained), compute.itemsize)
    assert alive.peak <= 1.02 * predicted + beside
    assert chunks == 1 or alive.peak > 0.9 * predicted
