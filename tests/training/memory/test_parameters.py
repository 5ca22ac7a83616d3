"""All trained parameters are in one vector; its groups set learning rates and weight decay."""

import tiny
import torch

from adaptkit.training.memory.parameters import Trainable
from adaptkit.training.network.adapt import parameter_places, train_whole
from adaptkit.training.network.model import load_model
from adaptkit.training.network.new_adapters import AdapterShape, new_adapter

CPU = torch.device("cpu")
IDS = torch.arange(3, 23).view(1, 20)


def test_parameters_are_views_of_one_vector_and_their_gradients_of_another(llama_nf4):
    model = load_model(llama_nf4, torch.float32, CPU)
    new_adapter(model, ("*",), AdapterShape(4, 8.0), "kaiming", 0.0, seed=0)
    before = {name: p.detach().clone() for name, p in model.network.named_parameters() if p.requires_grad}
    trainable = Trainable.of(model)
    assert trainable.values.numel() == sum(p.numel() for p in before.values())
    for name, parameter in model.network.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, before[name])
    model.network(IDS, labels=IDS, use_cache=False).loss.backward()
    assert float(trainable.gradients.norm()) > 0
    trainable.values.fill_(0.25)
    assert all(bool((p == 0.25).all()) for name, p in model.network.named_parameters() if name in before)


def test_lora_plus_multiplies_the_learning_rate_of_b(llama_nf4):
    model = load_model(llama_nf4, torch.float32, CPU)
    new_adapter(model, ("*",), AdapterShape(4, 8.0), "kaiming", 0.0, seed=0)
    (alone,) = Trainable.of(model).groups
    assert (alone.rate, alone.decay) == (1.0, True)
    trainable = Trainable.of(model, lora_plus_ratio=16.0)
    rates = torch.zeros_like(trainable.values)
    for group in trainable.groups:
        rates[group.span] = group.rate
    trainable.values.copy_(rates)
    for name, parameter in model.network.named_parameters():
        if parameter.requires_grad:
            assert bool((parameter == (16.0 if name.endswith("lora_b") else 1.0)).all())


def test_parameters_that_text_does_not_reach_do_not_decay(tmp_path):
    """Gemma 3's vision layers get no gradient from text, so torch's AdamW would not change them either."""
    model = load_model(tiny.write_architecture(tmp_path / "gemma3", "gemma3"), torch.float32, CPU)
    train_whole(model, set(parameter_places(model)))
    trained = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    in_order = torch.cat([p.detach().flatten() for p in sorted(trained, key=lambda p: p.dim() < 2)])
    trainable = Trainable.of(model)
    assert torch.equal(trainable.values, in_order)  # the order in run checkpoints, whatever decays
    decays = torch.zeros_like(trainable.values)
    for group in trainable.groups:
        decays[group.span] = group.decay
    trainable.values.copy_(decays)
    for name, whole in model.whole.items():
        is_text = name.startswith("model.language_model.") or name == "lm_head.weight"
        assert bool((whole.parameter == float(whole.parameter.dim() > 1 and is_text)).all())
