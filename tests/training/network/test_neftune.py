"""The noise follows the paper's formula, with each sample's own length, and only in training."""

import math

import pytest
import torch
from torch import nn

from adaptkit.data.batches import Batch, collate
from adaptkit.data.encoding import Sample
from adaptkit.training.network.neftune import EmbeddingNoise, sample_lengths


def sample(length):
    return Sample(tuple(range(length)), tuple(range(length)))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.zeros(16, 8))

    def get_input_embeddings(self):
        return self.table


def noise_of(batch, alpha, seed=0):
    model = Table().train()
    plain = model.table(batch.ids)
    noise = EmbeddingNoise(model, alpha)
    noise.expect(batch)
    torch.manual_seed(seed)
    return (model.table(batch.ids) - plain).detach()


def test_each_sample_has_its_own_length_packed_or_not():
    padded = collate([(sample(3),), (sample(5),)], 0)
    assert sample_lengths(padded).tolist() == [[3, 3, 3, math.inf, math.inf], [5] * 5]
    packed = collate([(sample(2), sample(3)), (sample(4),)], 0)
    assert sample_lengths(packed).tolist() == [[2, 2, 3, 3, 3], [4, 4, 4, 4, math.inf]]
    before = Batch(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([[0, 0, 1, 1]]))
    assert sample_lengths(before).tolist() == [[math.inf, math.inf, 2, 2]]


def test_noise_is_uniform_within_the_bound_of_the_formula():
    batch = collate([(sample(12),), (sample(4),)], 0)
    found = torch.stack([noise_of(batch, 5.0, seed) for seed in range(200)])
    for row, length in enumerate((12, 4)):
        bound = 5.0 / math.sqrt(length * 8)
        inside = found[:, row, :length]
        assert 0.98 * bound < inside.abs().max() <= bound + 1e-6
        assert inside.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)  # of the uniform distribution
        assert inside.mean().abs() < 0.03 * bound
    assert (found[:, 1, 4:] == 0).all()  # padding


def test_noise_depends_only_on_the_seed_and_is_not_added_in_evaluation():
    batch = collate([(sample(6),)], 0)
    assert torch.equal(noise_of(batch, 5.0, 1), noise_of(batch, 5.0, 1))
    assert not torch.equal(noise_of(batch, 5.0, 1), noise_of(batch, 5.0, 2))
    model = Table()
    EmbeddingNoise(model, 5.0).expect(batch)
    plain = model.table.weight[batch.ids]
    assert not torch.equal(model.train().table(batch.ids), plain)
    assert torch.equal(model.eval().table(batch.ids), plain)
