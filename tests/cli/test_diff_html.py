"""Pages of ``diff``: numbers as in the report, text escaped, bytes reproducible, no errors in a browser."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import edit_json, edited_tensors
from html_pages import Parsed, probe

from adaptkit.cli.pages._parts import curves_by_type
from adaptkit.cli.pages.diff import diff_page
from adaptkit.operations._diff.files import FileDifference, TemplateDifference, ValueDifference
from adaptkit.operations._diff.tensors import ChangeSpectrum, TensorDifference
from adaptkit.operations.diff import diff

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = (
    "<script>alert(1)</script>",
    "\"onmouseover='alert(1)'",
    "</title></style>",
    "a&amp;b",
    "--><b>",
    "$x_{",
    "日本",
)


def figures(document):
    """The heat maps of a page, in order: the caption of each, and the values of its cells."""
    found = []
    for drawn in re.findall(r"<figure>.*?</figure>", document, flags=re.DOTALL):
        cells = dict(title.rsplit(": ", 1) for title in Parsed(drawn).titles)
        if cells:
            found.append((re.search(r"<figcaption>(.*)</figcaption>", drawn)[1], cells))
    return found


def strokes(svg):
    """Heights of the points of each line in the first colour, in drawing order."""
    found = re.findall(r'd="([^"]+)" clip-path="[^"]+" style="fill: none;[^"]* stroke: #1f77b4[^"]*"', svg)
    return [[float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)] for path in found]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, llama):
    """A copy of the checkpoint with changed tensors, configuration and chat template."""
    folder = Path(shutil.copytree(llama, tmp_path_factory.mktemp("tuned") / "tuned"))
    with edited_tensors(folder / "model.safetensors") as tensors:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if "proj" in name or name == "model.norm.weight":
                noise = torch.randn(tensor.shape, generator=generator) * 0.02
                tensors[name] = (tensor.float() * (1 + noise)).to(tensor.dtype)
    edit_json(folder / "config.json", rope_theta=7.0)
    (folder / "chat_template.jinja").write_text("{{ changed }}\n")
    return folder


@pytest.fixture(scope="module")
def reports(adapter, second_adapter, llama, tuned):
    return {"adapters": diff(adapter, second_adapter), "checkpoints": diff(llama, tuned)}


def test_every_module_has_a_table_row_and_heat_map_cells_with_its_numbers(reports):
    report = reports["adapters"]
    document = diff_page(report)
    heading, *rows = Parsed(document).tables[f"All {len(report.modules)} modules"]
    assert [row[0] for row in rows] == [m.module for m in report.modules]
    for row, m in zip(rows, report.modules, strict=True):
        cells = dict(zip(heading, row, strict=False))
        assert cells["cosine"] == f"{m.cosine:+.3f}"
        assert float(cells["difference"].removesuffix(" %")) == pytest.approx(100 * m.relative, rel=5e-3)
        overlap = f"{m.columns.rms:.3f} ({m.columns.random:.3f})" if m.columns else "–"
        assert cells["out (random)"] == overlap
    (_, differences), (_, cosines), (_, outputs), (_, inputs) = figures(document)
    for m in report.modules:
        layer, kind = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", m.module).groups()
        where = f"model.layers.{layer} {kind}"
        assert float(differences.pop(where)) == pytest.approx(100 * m.relative, rel=5e-3)
        assert (where in cosines) == (m.columns is not None)
        if m.columns:
            assert float(cosines.pop(where)) == pytest.approx(m.cosine, abs=0.0051)
            assert float(outputs.pop(where)) == pytest.approx(m.columns.rms / m.columns.random, rel=5e-3)
            assert float(inputs.pop(where)) == pytest.approx(m.rows.rms / m.rows.random, rel=5e-3)
    assert {**differences, **cosines, **outputs, **inputs} == {}, "cells that no module stands for"


def test_spectra_and_angles_are_drawn_for_every_type_of_module(reports):
    report = reports["adapters"]
    document = diff_page(report)
    spectra, angles = (re.search(rf"<h2>{name}</h2>.*?</section>", document, re.DOTALL)[0] for name in
                       ("Spectra", "Principal angles"))  # fmt: skip
    kinds = {m.module.split(".", 3)[3] for m in report.modules}
    shared = {m.module.split(".", 3)[3] for m in report.modules if m.columns}
    assert shared < kinds
    for kind in kinds:
        assert f">{kind}</text>" in spectra
        assert (f">{kind}</text>" in angles) == (kind in shared)
    assert angles.count("stroke-dasharray") == 2 * len(shared), "a dotted line for either side's random subspaces"
    for name in ("first", "second", "difference"):
        assert f">{name}</text>" in spectra
    for svg in re.findall(r"<svg.*?</svg>", angles, re.DOTALL):
        (kind,) = (kind for kind in shared if f">{kind}</text>" in svg)
        overlaps = [m.columns for m in report.modules if m.module.endswith(kind)]
        cosines = [sum(column) / 2 for column in zip(*(o.cosines for o in overlaps), strict=True)]  # median of two
        heights, (level, _) = strokes(svg)
        expected = [c - overlaps[0].random for c in cosines]
        drawn = [level - height for height in heights]
        assert drawn == pytest.approx([e * drawn[0] / expected[0] for e in expected], rel=1e-2, abs=0.1)


def test_layers_and_module_types_have_tables(reports):
    tables = Parsed(diff_page(reports["adapters"])).tables
    assert [row[0] for row in tables["By layer"][1:]] == ["model.layers.0", "model.layers.1"]
    kinds = {row[0]: row[1] for row in tables["By type of module"][1:]}
    assert kinds["model.layers.*.mlp.up_proj"] == "2"
    assert {row[1] for row in tables["Modules in one only"][1:]} == {"first"}


def test_every_tensor_that_differs_has_a_table_row_and_heat_map_cells(reports):
    report = reports["checkpoints"]
    document = diff_page(report)
    parsed = Parsed(document)
    heading, *rows = parsed.tables[f"All {len(report.tensors)} tensors that differ"]
    assert [row[0] for row in rows] == [t.name for t in report.tensors]
    for row, t in zip(rows, report.tensors, strict=True):
        cells = dict(zip(heading, row, strict=True))
        assert float(cells["difference"].removesuffix(" %")) == pytest.approx(100 * t.relative, rel=5e-3)
        assert (cells["stable rank"] == "–") == (t.change is None)
    said = [cells for _, cells in figures(document)]
    assert sum(map(len, said)) == len(report.tensors) + sum(t.change is not None for t in report.tensors)
    assert float(said[0]["model.norm"]) == pytest.approx(100 * next(
        t.relative for t in report.tensors if t.name == "model.norm.weight"), rel=5e-3)  # fmt: skip
    assert ["config.json", "rope_theta", "absent", "7.0"] in parsed.tables["Configuration"]
    assert "Chat template default" in document
    assert "+{{ changed }}" in "".join(parsed.text)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_names_and_values_are_escaped(hostile, reports):
    beside = dataclasses.replace(
        reports["checkpoints"].beside,
        values=(ValueDifference(hostile, hostile, hostile, None),),
        files=(FileDifference(hostile, (hostile, None)),),
        templates=(TemplateDifference(hostile, (hostile, None), (hostile,)),),
    )
    change = ChangeSpectrum((2.0, 1.0), {"8": 1.0, "16": 1.0, "32": 1.0, "64": 1.0}, 1.2, 1.5)
    tensor = TensorDifference(
        f"model.layers.0.{hostile}.weight", hostile, (hostile, "F32"), ((3, 2), (3, 2)), 1, 6, (5.0, 5.0), 2.2, 0.4,
        change, hostile,
    )  # fmt: skip
    both = {"first": hostile, "second": hostile, "remarks": (hostile,), "beside": beside, "tensors": (tensor,)}
    modules = tuple(
        dataclasses.replace(m, module=f"model.layers.{i}.{hostile}")
        for i, m in enumerate(reports["adapters"].modules)
    )  # fmt: skip
    lonely = {"only_in_first": (hostile,), "only_in_second": (hostile,)}
    for kind, changes in (("adapters", {"modules": modules, "config": beside.values}), ("checkpoints", {})):
        document = diff_page(dataclasses.replace(reports[kind], **both, **changes, **lonely))
        parsed = Parsed(document)
        assert parsed.tags.count("script") == 1
        assert not [name for name, _ in parsed.attributes if name.startswith("on")]
        assert [hostile, hostile, hostile, "absent"] in parsed.tables["Configuration"]


@pytest.mark.parametrize("kind", ["adapters", "checkpoints"])
def test_pages_load_nothing_and_their_identifiers_are_unique(kind, reports):
    document = diff_page(reports[kind])
    parsed = Parsed(document)
    assert not {"link", "img", "image", "iframe", "object", "a"} & set(parsed.tags)
    assert not [v for k, v in parsed.attributes if k in {"src", "href", "xlink:href"} and not (v or "").startswith("#")]
    assert "@import" not in document
    assert not re.search(r"url\((?!#)", document)
    identifiers = [value for key, value in parsed.attributes if key == "id"]
    assert identifiers
    assert len(identifiers) == len(set(identifiers))


def test_module_types_with_the_same_name_in_two_stacks_get_separate_figures(reports):
    modules = [m for m in reports["adapters"].modules if m.module.endswith("up_proj")]
    twins = [dataclasses.replace(m, module=f"{stack}.{m.module}") for m in modules for stack in ("encoder", "decoder")]
    document = diff_page(dataclasses.replace(reports["adapters"], modules=tuple(twins)))
    identifiers = [value for key, value in Parsed(document).attributes if key == "id"]
    assert len(identifiers) == len(set(identifiers))
    assert "encoder.model" in document


def test_the_same_pair_gives_the_same_page(run_cli, adapter, second_adapter, tmp_path):
    pages = [tmp_path / name for name in ("one.html", "two.html")]
    for seed, page in enumerate(pages):
        assert run_cli("diff", adapter, second_adapter, "--html", page, PYTHONHASHSEED=str(seed)).code == 1
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_empty_and_equal_reports_make_valid_pages(adapter, llama, reports):
    assert "the same" in diff_page(diff(adapter, adapter))
    document = diff_page(diff(llama, llama))
    assert "the same" in document
    assert "<svg" not in document
    empty = dataclasses.replace(reports["adapters"], modules=(), layers=(), types=())
    assert "<svg" not in diff_page(empty)


def test_the_page_of_a_large_model_has_all_cells_and_stays_small(reports):
    modules = [m for m in reports["adapters"].modules if m.columns]
    many = tuple(
        dataclasses.replace(m, module=f"model.layers.{layer}.part_{chr(97 + i)}.{'x' * (i // 26)}w")
        for layer in range(30)
        for i, m in enumerate([*modules, *modules][:12])
    )
    document = diff_page(dataclasses.replace(reports["adapters"], modules=many))
    assert sum(len(cells) for _, cells in figures(document)) == 4 * 30 * 12
    assert len(document.encode()) < 1_600_000


@pytest.mark.parametrize("kind", ["adapters", "checkpoints"])
def test_a_browser_shows_the_page_at_phone_width_without_console_messages(kind, reports, tmp_path):
    report = reports[kind]
    (tmp_path / "page.html").write_text(diff_page(report), encoding="utf-8")
    found = probe(tmp_path)
    assert found["cells"] == sum(len(cells) for _, cells in figures(diff_page(report)))
    assert found["smallest"] >= 7
    assert found["overflow"] <= 0, "a phone scrolls the page sideways"
    assert min(found["pictures"]) > 40
    assert found["overlaps"] == 0, "labels on labels"
    assert found["said"] == found["title"]
    values = report.modules if kind == "adapters" else report.tensors
    expected = sorted(v.relative for v in values)
    assert found["up"] == pytest.approx(expected)
    assert found["down"] == pytest.approx(expected[::-1])


def test_without_matplotlib_a_page_is_refused_with_a_hint_and_diff_still_works(adapter, tmp_path):
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "from adaptkit.cli.main import main\n"
        "pair = sys.argv[1:3]\n"
        "for more, expected in (['--html', sys.argv[3]], 2), ([], 0):\n"
        "    sys.argv = ['adaptkit', 'diff', *pair, *more]\n"
        "    try:\n"
        "        code = main()\n"
        "    except SystemExit as end:\n"
        "        code = end.code\n"
        "    assert (code or 0) == expected, code\n"
    )
    command = [sys.executable, "-c", code, adapter, adapter, tmp_path / "x.html"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hint: pip install '.[report]' in adaptkit's checkout" in done.stderr
    assert not (tmp_path / "x.html").exists()


def test_a_curve_is_the_median_of_its_modules_and_as_long_as_the_longest():
    numbers = {"layers.0.q": [4.0, 2.0, 1.0], "layers.1.q": [8.0, 2.0, 1.0], "layers.2.q": [6.0, 2.0]}
    lines = {"line": {**numbers, "layers.0.k": [9.0] * 5}}
    (svg,) = curves_by_type(lines, ["layers.*.q"], "x", "y", levels={"layers.*.q": {"line": 4.0}})
    y, level = strokes(svg)
    assert len(y) == 3
    assert (y[1] - y[0]) / (y[2] - y[1]) == pytest.approx(4, rel=1e-3), "6, 2, 1"
    assert level[0] == level[1] == pytest.approx((y[0] + y[1]) / 2, rel=1e-3), "4 is between 6 and 2"


def test_a_logarithmic_curve_ends_before_values_that_are_only_rounding_errors():
    lines = {"line": {"layers.0.q": [1.0, 0.1, 1e-17], "layers.1.q": [2.0, 0.0, 0.0]}}
    (svg,) = curves_by_type(lines, ["layers.*.q"], "x", "y", logarithmic=True)
    assert [len(heights) for heights in strokes(svg)] == [2]
    assert curves_by_type({"line": {"layers.0.q": [0.0]}}, ["layers.*.q"], "x", "y", logarithmic=True) == []
