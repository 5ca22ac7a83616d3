"""Heat maps: where a name is, what shares a cell, and what has no room."""

import pytest
from html_pages import Parsed
from page_reports import of_quantization, quantization, quantized

from adaptkit.cli.pages.heat_maps import heat_figure, place


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.7.mlp.down_proj.weight", ("model.layers", "7", "mlp.down_proj")),
        ("model.layers.3.moe.experts.17.w1.weight", ("model.layers", "3", "moe.experts.*.w1")),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", ("encoder.block", "2", "layer.*.SelfAttention.q")),
        ("features.4.weight", ("features", "4", "weight")),
        ("4.weight", ("layers", "4", "weight")),
        ("lm_head.weight", ("", "lm_head", "")),
        ("layer１.²", ("", "layer１.²", "")),
    ],
)
def test_stack_layer_and_module_are_parsed_from_names(name, expected):
    assert place(name) == expected


def test_rows_are_in_numeric_order_and_stacks_are_separate():
    names = [f"{stack}.{n}.q.weight" for stack in ("encoder.layers", "decoder.layers") for n in (10, 2, 0)]
    figure = heat_figure(dict.fromkeys([*names, "lm_head.weight", "decoder.layers.2.k"], 1.0))
    assert [(drawn.stack, drawn.columns, [row.label for row in drawn.rows]) for drawn in figure.maps] == [
        ("decoder.layers", ("k", "q"), ["0", "2", "10"]), ("encoder.layers", ("q",), ["0", "2", "10"]),
        ("", ("",), ["lm_head"]),
    ]  # fmt: skip
    assert figure.has_gaps
    assert figure.marks == ()


def test_experts_share_a_cell_with_their_mean():
    figure = heat_figure({f"model.layers.1.experts.{e}.w1.weight": e / 10 for e in range(5)}, 0.0, 1.0)
    (((cell,),),) = ([row.cells for row in drawn.rows] for drawn in figure.maps)
    assert cell.title == "model.layers.1 experts.*.w1: 0.200 (mean of 5, at most 0.400)"
    assert figure.marks == ("0.00", "0.500", "1.00")


def test_signed_values_have_a_sign_and_a_pale_middle():
    figure = heat_figure({"l.0.a": -1.0, "l.0.b": 0.004, "l.0.c": 0.52}, -1.0, 1.0, signed=True)
    cells = figure.maps[0].rows[0].cells
    assert [cell.shown for cell in cells] == ["-1.00", "0.00", "+0.52"]
    assert [cell.ink for cell in cells][:2] == ["#fff", "#000"]


def test_names_without_a_layer_become_rows_and_omitted_ones_are_counted():
    tensors = [quantized(f"block_{chr(97 + i % 26)}{i // 26 * 'x'}", 0.05 + i / 1000) for i in range(60)]
    ((caption, cells),) = Parsed(of_quantization(quantization(tensors))).maps.items()
    largest = sorted(tensors, key=lambda t: -t.relative_error)[:48]
    assert list(cells) == [t.name for t in largest]
    assert "12 smaller values of modules without a layer number are only in the table." in caption
