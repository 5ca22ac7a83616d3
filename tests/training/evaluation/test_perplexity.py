"""Perplexity on windows: the logits of one window are in memory at a time."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from adaptkit.training.evaluation import perplexity
from adaptkit.training.network.model import load_model


def test_the_logits_of_a_window_are_freed_before_the_next_are_computed(llama, monkeypatch):
    made, make = [], perplexity._next_token_logits

    def watched(model, window):
        assert all(storage.expired() for storage in made)
        logits = make(model, window)
        made.append(StorageWeakRef(logits.untyped_storage()))
        return logits

    monkeypatch.setattr(perplexity, "_next_token_logits", watched)
    model = load_model(llama, torch.float32, torch.device("cpu"))
    windows = torch.randint(0, 256, (3, 90), generator=torch.Generator().manual_seed(0))
    found = perplexity.measure_text(model, windows)
    assert (len(made), found.tokens) == (3, 3 * 89)
    with torch.no_grad():
        logits = model.network(input_ids=windows).logits[:, :-1].double()
    expected = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    torch.testing.assert_close(found.loss, float(expected), rtol=1e-6, atol=0)
