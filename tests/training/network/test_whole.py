"""Embeddings and output layers that are trained in full."""

import pytest
import tiny
import torch
import transformers
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from adaptkit.data.batches import Batch
from adaptkit.models.activations import Alive
from adaptkit.training.network import loss, whole
from adaptkit.training.network.adapt import train_whole
from adaptkit.training.network.loss import summed_loss
from adaptkit.training.network.model import load_model

CPU = torch.device("cpu")
SHARE = 1 / 7
OTHERS = {"granite": {"logits_scaling": 4.0}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64}}
FAMILIES = ["llama", "phi", "gemma", *OTHERS]


@pytest.fixture(scope="module")
def folders(made):
    """Llama ties its tables, Phi has a bias, and Gemma scales the embedding's rows.

    Granite scales its logits after the output layer, and OPT's body is not called by itself.
    """
    found = {"llama": tiny.write_llama(made / "whole-llama")}
    found |= {name: tiny.write_family(made / f"whole-{name}", name) for name in ("phi", "gemma")}
    with pytest.MonkeyPatch.context() as patch:
        for name, values in OTHERS.items():
            patch.setitem(tiny.ARCHITECTURES, name, values)
            found[name] = tiny.write_architecture(made / f"whole-{name}", name)
    return found


def batches(vocabulary):
    """Two micro-batches, in which tokens repeat."""
    generator = torch.Generator().manual_seed(3)
    for length in (9, 14):
        ids = torch.randint(0, vocabulary // 8, (2, length), generator=generator)
        labels = ids.clone()
        labels[:, : length // 3] = -100
        yield Batch(ids, labels, torch.ones_like(ids))


def tables(network):
    return {network.get_input_embeddings(), network.get_output_embeddings()}


def names(network):
    return {name for name, module in network.named_modules() if module in tables(network)}


def expected(folder):
    """Return the gradients of both tables for the plain model in float64; one if they are tied."""
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    network.get_input_embeddings().padding_idx = None  # may also be an answer's end token
    for batch in batches(network.config.vocab_size):
        logits = network(input_ids=batch.ids).logits[:, :-1].flatten(0, 1)
        value = functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)
        (value * SHARE).backward()
    return {id(module.weight): module.weight.grad for module in tables(network)}, names(network)


def trained(folder, dtype, which):
    model = load_model(folder, dtype, CPU)
    train_whole(model, {f"{name}.weight" for name in which})
    return model, list({id(part.parameter): part.parameter for part in model.whole.values()}.values())


def accumulated(model, parameters):
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for batch in batches(model.network.config.vocab_size):
        (summed_loss(model, batch, SHARE) * SHARE).backward()
    return [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_gradients_are_those_of_the_plain_model(folders, family, monkeypatch):
    monkeypatch.setattr(loss, "rows_at_a_time", lambda *_: 5)
    monkeypatch.setattr(whole, "GRADIENT_BLOCK_BYTES", 20_000)
    wanted, which = expected(folders[family])
    model, parameters = trained(folders[family], torch.float32, which)
    found = accumulated(model, parameters)
    assert len(found) == len(wanted)
    for gradient in wanted.values():
        distances = [float((one - gradient).norm() / gradient.norm()) for one in found]
        assert min(distances) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_bfloat16_are_accumulated_in_float32(folders, family):
    """Their error is that of the activations; a token's many gradients are not summed in bfloat16."""
    wanted, which = expected(folders[family])
    model, parameters = trained(folders[family], torch.bfloat16, which)
    found = accumulated(model, parameters)
    for gradient in wanted.values():
        assert min(float((one - gradient).norm() / gradient.norm()) for one in found) < 0.03
    embedding, table = model.network.get_input_embeddings(), torch.zeros(4, 3)
    known = torch.nn.Parameter(table, requires_grad=True)
    known.grad = torch.zeros_like(table)
    whole._LookUp.apply(torch.full((1000,), 2), known, torch.bfloat16).sum().backward()
    assert torch.equal(known.grad[2], torch.full((3,), 1000.0))
    assert embedding(torch.arange(3)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_the_cast_weights(folders, family, dtype):
    """Bit for bit: the model computes what the merged or published one will."""
    plain = load_model(folders[family], dtype, CPU)
    model, _ = trained(folders[family], dtype, names(plain.network))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model.network(input_ids=ids).logits, plain.network(input_ids=ids).logits)


def test_no_gradient_of_the_size_of_an_embedding_is_formed(folders):
    model, (parameter,) = trained(folders["llama"], torch.bfloat16, {"model.embed_tokens", "lm_head"})
    embedding = model.network.get_input_embeddings()
    parameter.grad = torch.zeros_like(parameter)
    with Alive([parameter, parameter.grad]) as alive:
        embedding(torch.arange(4)[None]).sum().backward()
    assert alive.peak < parameter.nbytes / 8
    assert parameter.grad[:4].eq(1).all()
    assert not parameter.grad[4:].any()


class Casts(TorchDispatchMode):
    """Counts casts of tensors of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def test_each_chunk_of_logits_casts_the_output_layer_once(folders, monkeypatch):
    monkeypatch.setattr(loss, "rows_at_a_time", lambda *_: 5)
    model, (parameter,) = trained(folders["llama"], torch.bfloat16, {"model.embed_tokens", "lm_head"})
    parameter.grad = torch.zeros_like(parameter)
    batch = next(iter(batches(model.network.config.vocab_size)))
    chunks = -(-int((batch.labels[:, 1:] != -100).sum()) // 5)
    with Casts(parameter.shape) as casts:
        (summed_loss(model, batch, SHARE) * SHARE).backward()
    assert casts.count == chunks + 1  # and once to find out which parameters it depends on
