"""Linear layers, and subclasses that do more."""

import importlib

import pytest
import tiny
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.pytorch_utils import Conv1D

from adaptkit.models.linears import acts_as_linear, is_linear


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, FalconLinear])
def test_modules_that_multiply_and_add_a_bias_act_as_linear_layers(kind):
    assert acts_as_linear(kind(3, 2))
    assert is_linear(kind(3, 2)) == (kind in (nn.Linear, Conv1D))


@pytest.mark.parametrize("kind", [IdeficsDecoupledLinear, nn.Embedding])
def test_modules_that_do_more_or_less_do_not_act_as_linear_layers(kind):
    assert not acts_as_linear(kind(3, 2))


@pytest.mark.parametrize(
    ("of", "name"),
    [("deepseek_v4", "DeepseekV4GroupedLinear"), ("llama4", "Llama4Router"), ("phimoe", "PhimoeTopKRouter")],
)
def test_routers_and_grouped_layers_do_not_act_as_linear_layers(of, name):
    tiny.need_architecture(of)
    kind = getattr(importlib.import_module(f"transformers.models.{of}.modeling_{of}"), name)
    module = kind.__new__(kind)
    nn.Linear.__init__(module, 3, 2)
    assert not acts_as_linear(module)


def test_a_layer_whose_weight_attention_reads_directly_does_not_act_as_linear():
    assert not acts_as_linear(nn.MultiheadAttention(4, 2).out_proj)
