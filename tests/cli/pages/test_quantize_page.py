"""The page of ``quantize``: the numbers of the report, in its tables and heat maps."""

import re

import pytest
from html_pages import Parsed
from page_reports import MODULES, model, named, of_quantization, quantization, quantized

from adaptkit.operations.quantize import Upgrade


def test_the_table_has_a_row_for_every_tensor_with_its_numbers():
    report = model(weighted=0.05)
    parsed, name = Parsed(of_quantization(report)), f"All {len(report.tensors)} tensors"
    heading, *rows = parsed.tables[name]
    assert [row[0] for row in rows] == [t.name for t in report.tensors]
    for row, values, t in zip(rows, parsed.values[name][1:], report.tensors, strict=True):
        shown, sorted_by = dict(zip(heading, row, strict=True)), dict(zip(heading, values, strict=True))
        expected = {
            "relative error": t.relative_error, "weighted error": t.weighted_error, "bits per weight": t.bits,
            "before": t.bytes_before, "after": t.bytes_after,
        }  # fmt: skip
        for key, value in expected.items():
            assert sorted_by[key] == (None if value is None else pytest.approx(value, rel=1e-8)), key
        assert shown["relative error"] == ("–" if t.relative_error is None else f"{100 * t.relative_error:.3g} %")
        assert (shown["shape"], shown["before"]) == ("64×128", "16.4 kB")
        assert shown["format"] == (t.format or f"kept: {t.kept_because}")


def test_every_heat_map_cell_names_its_tensor_and_value_and_brightens_with_it():
    report = model(layers=8)
    document = of_quantization(report)
    (cells,) = Parsed(document).maps.values()
    assert list(cells) == [f"model.layers.{name.split('.', 3)[2]} {name.split('.', 3)[3]}" for name in sorted_names(8)]
    errors = {t.name: t.relative_error for t in report.tensors if t.format}
    for (where, value), name in zip(cells.items(), sorted_names(8), strict=True):
        assert float(value) == pytest.approx(100 * errors[f"{name}.weight"], rel=5e-3), where
    fills = re.findall(r'title="[^"]*: ([0-9.]+)" style="background:(#[0-9a-f]{6});', document)
    assert len(fills) == len(cells)
    weights = ((0.299, 1), (0.587, 3), (0.114, 5))
    light = [sum(w * int(c[i : i + 2], 16) for w, i in weights) for _, c in sorted(fills, key=lambda f: float(f[0]))]
    assert light == sorted(light)
    assert light[-1] > light[0] + 100


def sorted_names(layers):
    """The modules in the order of the cells: by layer, then by name."""
    return named(layers, sorted(MODULES))


def test_the_summary_and_the_ten_worst_come_from_the_report():
    report = model(layers=6)
    parsed = Parsed(of_quantization(report))
    assert parsed.facts["wrote"] == "out/model-nf4 (1 shard)"
    assert parsed.facts["tensors root"] == report.tensors_root
    assert parsed.facts["manifest sha256"] == report.manifest_sha256
    assert f"{report.parameters:,} parameters" in parsed.facts["quantized"]
    assert parsed.facts["in all"].startswith(f"{report.bytes_before / report.bytes_after:.2f} × smaller")
    worst = sorted((t for t in report.tensors if t.format), key=lambda t: -t.relative_error)[:10]
    assert [row[0] for row in parsed.tables["Largest relative errors"][1:]] == [t.name for t in worst]
    assert "All 24 quantized tensors." in parsed.text


def test_the_worst_tensors_are_chosen_by_the_weighted_error_if_known():
    tensors = [quantized(f"h.{i}.w", error=0.1 + i / 1000, weighted=0.2 - i / 1000) for i in range(12)]
    parsed = Parsed(of_quantization(quantization(tensors)))
    assert [row[0] for row in parsed.tables["Largest weighted errors"][1:]] == [f"h.{i}.w" for i in range(10)]
    assert [len(cells) for cells in parsed.maps.values()] == [12, 12]


def test_unquantized_tensors_are_counted_by_reason_and_named_once_for_all_layers():
    kept = {row[0]: row[1:] for row in Parsed(of_quantization(model(layers=12))).tables["Kept unchanged"][1:]}
    assert kept == {
        "norm": ["12", "196.6 kB", "model.layers.*.norm.weight"],
        "embedding": ["1", "16.4 kB", "model.embed_tokens.weight"],
    }


def test_bits_get_a_figure_only_if_they_differ():
    spent = quantized("model.layers.5.mlp.up_proj.weight", kept="budget")
    (_,), (_, bits) = (
        Parsed(of_quantization(report)).maps.values()
        for report in (model(), quantization([*model(layers=2).tensors, spent]))
    )
    assert bits["model.layers.5 mlp.up_proj"] == "16.0"
    assert not [name for name in bits if name.endswith("norm")]


@pytest.mark.parametrize(
    "tensors",
    [[], [quantized("n.weight", kept="norm")], [quantized("l.0.q.weight", 0.0)], [quantized("l.0.q.weight", None)]],
    ids=["none", "kept", "lossless", "dry run"],
)
def test_reports_with_few_tensors_make_valid_pages(tensors):
    parsed = Parsed(of_quantization(quantization(tensors)))
    (table,) = (rows for heading, rows in parsed.tables.items() if heading.startswith("All"))
    assert [row[0] for row in table[1:]] == [t.name for t in tensors]
    assert bool(parsed.maps) == ("svg" in parsed.tags) == any(t.relative_error is not None for t in tensors)


def test_a_large_model_makes_a_small_page():
    document = of_quantization(model(layers=128, modules=[f"mlp.part_{chr(97 + i)}" for i in range(12)]))
    assert sum(map(len, Parsed(document).maps.values())) == 128 * 12
    assert len(document.encode()) < 1_000_000


def test_upgrades_are_listed_in_their_order():
    upgrades = (Upgrade("model.layers.3.mlp.up_proj", "blocks of 32", 2048, 0.5), Upgrade("x", "16 bits", 4096, 0.25))
    parsed = Parsed(of_quantization(quantization([quantized("x.weight")], upgrades)))
    assert parsed.tables["More bits where they save most"][1:] == [
        ["model.layers.3.mlp.up_proj", "blocks of 32", "2,048", "0.5"],
        ["x", "16 bits", "4,096", "0.25"],
    ]
