"""The pages of ``diff``: the numbers of the report, in tables, heat maps and curves."""

import dataclasses
import re

import pytest
from html_pages import Parsed
from page_reports import MODULES, adapters, checkpoints, named, of_difference

from adaptkit.cli.pages.pictures import curves_by_type


def strokes(svg):
    """Heights of the points of each line in the first colour, in drawing order."""
    found = re.findall(r'd="([^"]+)" clip-path="[^"]+" style="fill: none;[^"]* stroke: #1f77b4[^"]*"', svg)
    return [[float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)] for path in found]


def pictures(document, heading):
    """The SVG pictures of a section."""
    return re.findall(
        r"<svg.*?</svg>", re.search(rf"<h2>{heading}</h2>.*?</section>", document, re.DOTALL)[0], re.DOTALL
    )


def where(module):
    """The name of a module's cell."""
    return re.sub(r"(\d+)\.", r"\1 ", module.removesuffix(".weight"), count=1)


def test_every_module_has_a_table_row_and_heat_map_cells_with_its_numbers():
    report = adapters(named())
    parsed = Parsed(of_difference(report))
    heading, *rows = parsed.tables[f"All {len(report.modules)} modules"]
    assert [row[0] for row in rows] == [m.module for m in report.modules]
    difference, cosine, outputs, inputs = parsed.maps.values()
    for row, m in zip(rows, report.modules, strict=True):
        cells = dict(zip(heading, row, strict=False))
        assert cells["cosine"] == f"{m.cosine:+.3f}"
        assert float(cells["difference"].removesuffix(" %")) == pytest.approx(100 * m.relative, rel=5e-3)
        assert cells["out (random)"] == (f"{m.columns.rms:.3f} ({m.columns.random:.3f})" if m.columns else "–")
        assert row[-6:-4] == [str(rank) for rank in m.ranks]
        assert float(difference.pop(where(m.module))) == pytest.approx(100 * m.relative, rel=5e-3)
        if m.columns:
            assert float(cosine.pop(where(m.module))) == pytest.approx(m.cosine, abs=0.0051)
            assert float(outputs.pop(where(m.module))) == pytest.approx(m.columns.rms / m.columns.random, rel=5e-3)
            assert float(inputs.pop(where(m.module))) == pytest.approx(m.rows.rms / m.rows.random, rel=5e-3)
    assert {**difference, **cosine, **outputs, **inputs} == {}, "cells that no module stands for"


def test_spectra_and_angles_are_drawn_for_every_type_of_module():
    report = adapters(named())
    document = of_difference(report)
    spectra, angles = ("".join(pictures(document, name)) for name in ("Spectra", "Principal angles"))
    for kind in MODULES:
        assert f">{kind}</text>" in spectra
        assert f">{kind}</text>" in angles
    assert angles.count("stroke-dasharray") == 2 * len(MODULES), "a dotted line for either side's random subspaces"
    for name in ("first", "second", "difference", "rank", "singular value"):
        assert f">{name}</text>" in spectra
    assert "currentColor" in spectra


def test_layers_module_types_and_lonely_modules_have_tables():
    tables = Parsed(of_difference(adapters(named(), "x"))).tables
    assert [row[0] for row in tables["By layer"][1:]] == [f"model.layers.{n}" for n in range(3)]
    assert {row[0]: row[1] for row in tables["By type of module"][1:]} == {f"model.layers.*.{m}": "3" for m in MODULES}
    assert tables["Modules in one only"][1:] == [["model.layers.2.mlp.down_proj", "first"]]
    assert tables["Other tensors"][1][:3] == ["x", "x", "20 %"]
    assert tables["Other tensors in one only"][1:] == [["x", "first"]]


def test_every_tensor_that_differs_has_a_table_row_and_heat_map_cells():
    report = checkpoints([f"{name}.weight" for name in (*named(), "model.norm")], "x")
    document = of_difference(report)
    parsed = Parsed(document)
    heading, *rows = parsed.tables[f"All {len(report.tensors)} tensors that differ"]
    assert [row[0] for row in rows] == [t.name for t in report.tensors]
    difference, low_rank = parsed.maps.values()
    for row, t in zip(rows, report.tensors, strict=True):
        cells = dict(zip(heading, row, strict=True))
        assert (cells["difference"] == "–") == (t.relative is None)
        if t.relative is not None:
            assert float(cells["difference"].removesuffix(" %")) == pytest.approx(100 * t.relative, rel=5e-3)
            assert float(difference.pop(where(t.name))) == pytest.approx(100 * t.relative, rel=5e-3)
            assert float(low_rank.pop(where(t.name))) == pytest.approx(100 * t.change.energy["16"], rel=5e-3)
        assert cells["shape"] == ("3×2" if t.change else "3×2 → 4")
        assert cells["type"] == "BF16 → F32"
    assert {**difference, **low_rank} == {}
    assert len(pictures(document, "Directions")) == len(MODULES)
    assert ["config.json", "x", "x", "absent"] in parsed.tables["Configuration"]
    assert ["x", "x", "absent"] in parsed.tables["Other files"]
    assert (parsed.facts["files"], parsed.facts["changes"]) == ("x and absent", "+x")


def test_module_types_with_the_same_name_in_two_stacks_get_separate_figures():
    names = [f"{stack}.layers.{n}.up_proj" for stack in ("encoder", "decoder") for n in range(2)]
    document = of_difference(adapters([*names, "last"]))
    assert len(pictures(document, "Spectra")) == 3
    for stack in ("encoder", "decoder"):
        assert f">{stack}.layers.*.up_proj</text>" in document


def test_empty_reports_make_valid_pages_without_pictures():
    report = dataclasses.replace(adapters(named()), modules=(), layers=(), types=(), same=True)
    parsed = Parsed(of_difference(report))
    assert (parsed.facts["adapters"], parsed.maps, "svg" in parsed.tags) == ("the same", {}, False)
    parsed = Parsed(of_difference(dataclasses.replace(checkpoints(["x"]), tensors=(), same=True)))
    assert (parsed.facts["checkpoints"], parsed.maps, "svg" in parsed.tags) == ("the same", {}, False)


def test_the_page_of_a_large_model_has_all_cells_and_stays_small():
    module, _ = adapters(["model.layers.0.q", "last"]).modules
    names = named(30, [f"part_{chr(97 + i)}" for i in range(12)])
    many = tuple(dataclasses.replace(module, module=name) for name in names)
    document = of_difference(dataclasses.replace(adapters(["x", "y"]), modules=many))
    assert sum(map(len, Parsed(document).maps.values())) == 4 * 30 * 12
    assert len(document.encode()) < 1_600_000


def test_a_curve_is_the_median_of_its_modules_and_as_long_as_the_longest():
    numbers = {"layers.0.q": [4.0, 2.0, 1.0], "layers.1.q": [8.0, 2.0, 1.0], "layers.2.q": [6.0, 2.0]}
    (svg,) = curves_by_type({"line": numbers}, {"layers.0.q": 1.0}, "x", "y", levels={"line": {"layers.0.q": 4.0}})
    y, level = strokes(svg)
    assert len(y) == 3
    assert (y[1] - y[0]) / (y[2] - y[1]) == pytest.approx(4, rel=1e-3), "6, 2, 1"
    assert level[0] == level[1] == pytest.approx((y[0] + y[1]) / 2, rel=1e-3), "4 is between 6 and 2"


def test_a_logarithmic_curve_ends_before_values_that_are_only_rounding_errors():
    numbers = {"layers.0.q": [1.0, 0.1, 1e-17], "layers.1.q": [2.0, 0.0, 0.0]}
    (svg,) = curves_by_type({"line": numbers}, {"layers.0.q": 1.0}, "x", "y", logarithmic=True)
    assert [len(heights) for heights in strokes(svg)] == [2]
    zero = {"line": {"layers.0.q": [0.0]}}
    assert curves_by_type(zero, {"layers.0.q": 1.0}, "x", "y", logarithmic=True) == []
