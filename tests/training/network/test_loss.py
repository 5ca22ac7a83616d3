"""The loss is the plain cross-entropy, its gradients too, and no matrix of logits is ever made."""

import pytest
import tiny
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from adaptkit.training.data.batches import Batch
from adaptkit.training.network import loss
from adaptkit.training.network.loss import summed_loss
from adaptkit.training.network.model import load_model, new_adapter

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
    """What transformers itself would compute, padding masked, in float64 from its logits on."""
    logits = model.network(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1].double()
    flat = logits.reshape(-1, logits.shape[-1])
    return functional.cross_entropy(flat, batch.labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")


def gradients(model, value):
    trained = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(value, trained.values()), strict=True))


def loaded(folder, whole=()):
    model = load_model(folder, torch.float32, torch.device("cpu"))
    new_adapter(model, ("*",), 4, 8.0, "normal", 0.0, 0)
    generator = torch.Generator().manual_seed(1)
    for layer in model.adapted().values():
        layer.lora_b.data.normal_(std=0.1, generator=generator)
    for part in whole:
        model.network.get_submodule(part).requires_grad_()
    return model


@pytest.fixture(scope="module")
def families(made):
    found = {name: tiny.write_family(made / f"loss-{name}", name) for name in ("phi", "qwen3_moe")}
    return found | {"gpt2": tiny.write_gpt2(made / "loss-gpt2")}


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("family", ["llama", "phi", "gpt2", "qwen3_moe"])
def test_loss_and_gradients_are_those_of_the_whole_matrix(family, rows, families, llama, monkeypatch):
    """With a head that is tied, one with a bias, and experts; in one chunk and in many."""
    monkeypatch.setattr(loss, "_rows", lambda hidden, head: rows)
    monkeypatch.setattr(loss, "_BLOCK_BYTES", 4 * 3 * VOCABULARY)
    model = loaded(families.get(family, llama))
    batch = batch_of((20, 13, 7), model.network.config.vocab_size)
    expected = plain_loss(model, batch)
    value = summed_loss(model, batch)
    assert model.logits_are_the_heads
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    found, wanted = gradients(model, value / 7), gradients(model, expected / 7)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient.float(), rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_a_trained_output_layer_gets_its_gradient(families, monkeypatch):
    monkeypatch.setattr(loss, "_rows", lambda hidden, head: 4)
    model = loaded(families["phi"], whole=("lm_head",))
    batch = batch_of((20, 13), model.network.config.vocab_size)
    found, wanted = (gradients(model, way(model, batch)) for way in (summed_loss, plain_loss))
    assert {"lm_head.weight", "lm_head.bias"} <= set(found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient.float(), rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_without_gradients_it_is_the_same_number(llama):
    model = loaded(llama)
    batch = batch_of((20, 13), model.network.config.vocab_size)
    with torch.no_grad():
        assert not summed_loss(model, batch).requires_grad
        assert float(summed_loss(model, batch)) == float(summed_loss(model, batch))
    assert float(summed_loss(model, batch).detach()) == pytest.approx(
        float(plain_loss(model, batch).detach()), rel=1e-6
    )


def test_logits_that_are_bounded_after_the_output_layer_are_still_right(made):
    import transformers

    config = transformers.Gemma2Config(
        **tiny._DECODER, vocab_size=VOCABULARY, head_dim=16, final_logit_softcapping=2.0, pad_token_id=0
    )
    torch.manual_seed(0)
    transformers.Gemma2ForCausalLM(config).save_pretrained(made / "bounded")
    model = loaded(made / "bounded")
    batch = batch_of((20, 13), VOCABULARY)
    assert not model.logits_are_the_heads
    assert float(summed_loss(model, batch).detach()) == pytest.approx(
        float(plain_loss(model, batch).detach()), rel=1e-5
    )


class Largest(TorchDispatchMode):
    """Remembers the most rows that a result with the vocabulary as its last dimension had; a transpose is no result."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_made = isinstance(result, torch.Tensor) and func is not torch.ops.aten.t.default
        if is_made and result.dim() == 2 and result.shape[-1] == self.vocabulary:
            self.rows = max(self.rows, result.shape[0])
        return result


def test_no_more_logits_exist_than_a_chunk_has(llama, monkeypatch):
    monkeypatch.setattr(loss, "_rows", lambda hidden, head: 8)
    model = loaded(llama)
    batch = batch_of((60, 60), model.network.config.vocab_size)
    with Largest() as seen:
        seen.vocabulary = model.network.config.vocab_size
        summed_loss(model, batch).backward()
    assert seen.rows == 8
