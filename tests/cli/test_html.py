"""Pages of ``quantize`` and their parts: numbers as in the report, text escaped, bytes reproducible."""

import dataclasses
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from html_pages import Parsed, browse, probe

from adaptkit.checkpoint.writer import DiskError
from adaptkit.cli import figures
from adaptkit.cli.grid import grids, place
from adaptkit.cli.html import Html, Number, facts, figure, page, paragraph, section, table, text
from adaptkit.cli.output import write_whole
from adaptkit.cli.pages import prepare
from adaptkit.cli.pages.quantize import quantize_page
from adaptkit.errors import UsageError
from adaptkit.operations.quantize import QuantizeReport, TensorReport, Upgrade

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = (
    "<script>alert(1)</script>", "\"onmouseover='alert(1)'", "</title></style>", "a&amp;b", "]]>", "--><b>",
    "$\\frac{x$", "\u202etxt", "日本", "_private",
)  # fmt: skip
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def tensor(name, error=0.09, weighted=None, bits=4.127, shape=(64, 128), kept=""):
    before = 2 * math.prod(shape)
    if kept:
        return TensorReport(name, shape, "", 16.0, before, before, kept_because=kept)
    return TensorReport(name, shape, "nf4", bits, before, round(before * bits / 16), error, weighted)


def report_of(tensors):
    """A report on these tensors, with sums computed from them."""
    encoded = [t for t in tensors if t.format]
    reasons = [t.kept_because for t in tensors if t.kept_because]
    return QuantizeReport(
        output="out/model-nf4",
        quantized=len(encoded),
        quantized_parameters=sum(math.prod(t.shape) for t in encoded),
        parameters=sum(math.prod(t.shape) for t in tensors),
        kept={reason: reasons.count(reason) for reason in sorted(set(reasons))},
        read_from="names and shapes",
        bytes_before=sum(t.bytes_before for t in tensors),
        bytes_after=sum(t.bytes_after for t in tensors),
        bits_per_parameter=4.127,
        relative_error=0.0923,
        weighted_error=None,
        calibrated=0,
        shards=1,
        tensors=tuple(tensors),
        tensors_root="ab" * 32,
        manifest_sha256="cd" * 32,
    )


def model(layers=3, modules=MODULES, **options):
    """A report on an ordinary model; all errors are different."""
    tensors = [tensor("model.embed_tokens.weight", kept="embedding")]
    for layer in range(layers):
        tensors += [
            tensor(f"model.layers.{layer}.{module}.weight", 0.08 + 0.0011 * (layer * len(modules) + column), **options)
            for column, module in enumerate(modules)
        ]
        tensors.append(tensor(f"model.layers.{layer}.input_layernorm.weight", shape=(64,), kept="norm"))
    return report_of(tensors)


def cells(document):
    """Tooltips of the heat maps: tensor -> value."""
    return dict(title.rsplit(": ", 1) for title in Parsed(document).titles[1:])


def test_the_table_has_a_row_for_every_tensor_with_its_numbers():
    report = model(weighted=0.05)
    parsed = Parsed(quantize_page(report))
    heading, *rows = parsed.in_order[-1]
    assert [row[0] for row in rows] == [t.name for t in report.tensors]
    which = len(parsed.in_order) - 1
    for index, t in enumerate(report.tensors, start=1):
        expected = {
            "relative error": t.relative_error, "weighted error": t.weighted_error, "bits per weight": t.bits,
            "before": t.bytes_before, "after": t.bytes_after,
        }  # fmt: skip
        for name, value in expected.items():
            found = parsed.values.get(f"{which}-{index}-{heading.index(name)}")
            assert (found is None) == (value is None), (t.name, name)
            assert value is None or found == pytest.approx(value, rel=1e-8), (t.name, name)
        assert rows[index - 1][heading.index("shape")] == "×".join(map(str, t.shape))
        assert rows[index - 1][heading.index("format")] == (t.format or f"kept: {t.kept_because}")


def test_every_heat_map_cell_names_its_tensor_and_value():
    report = model()
    said = cells(quantize_page(report))
    for t in report.tensors:
        if t.format:
            layer, module = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", t.name).groups()
            assert float(said.pop(f"model.layers.{layer} {module}")) == pytest.approx(100 * t.relative_error, rel=5e-3)
    assert not said, "cells that no tensor stands for"


def test_heat_map_colours_brighten_with_the_values():
    document = quantize_page(model(layers=8))
    found = re.findall(r'class="cell" d="[^"]+" fill="(#[0-9a-f]{6})"><title>[^<]*: ([0-9.]+)</title>', document)
    assert len(found) == 8 * len(MODULES)
    light = [
        sum(w * int(c[i : i + 2], 16) for w, i in ((0.299, 1), (0.587, 3), (0.114, 5)))
        for c, _ in sorted(found, key=lambda f: float(f[1]))
    ]
    assert light == sorted(light), "viridis brightens with the value"
    assert light[-1] > light[0] + 100


def test_the_summary_and_the_ten_worst_come_from_the_report():
    report = model(layers=6)
    parsed = Parsed(quantize_page(report))
    facts_shown = " | ".join(parsed.facts)
    for value in (
        report.output,
        report.tensors_root,
        report.manifest_sha256,
        report.read_from,
        f"{report.parameters:,}",
    ):
        assert value in facts_shown
    worst = sorted((t for t in report.tensors if t.format), key=lambda t: -t.relative_error)[:10]
    assert [row[0] for row in parsed.in_order[0][1:]] == [t.name for t in worst]


def test_the_worst_tensors_are_chosen_by_the_weighted_error_if_known():
    tensors = [tensor(f"h.{i}.w", error=0.1 + i / 1000, weighted=0.2 - i / 1000) for i in range(12)]
    parsed = Parsed(quantize_page(report_of(tensors)))
    assert [row[0] for row in parsed.in_order[0][1:]] == [f"h.{i}.w" for i in range(10)]


def test_unquantized_tensors_are_counted_by_reason_and_named_once_for_all_layers():
    kept = {row[0]: row[1:] for row in Parsed(quantize_page(model(layers=12))).in_order[1][1:]}
    assert kept["norm"] == ["12", "1.5 kB", "model.layers.*.input_layernorm.weight"]
    assert kept["embedding"][::2] == ["1", "model.embed_tokens.weight"]


def test_bits_get_a_figure_only_if_they_differ():
    plain, mixed = model(), model(layers=2)
    first, *others = (t for t in mixed.tensors)
    spent = tensor("model.layers.5.mlp.up_proj.weight", kept="budget")
    documents = [quantize_page(plain), quantize_page(report_of([first, *others, spent]))]
    assert ["<h2>Bits</h2>" in document for document in documents] == [False, True]
    assert cells(documents[1])["model.layers.5 mlp.up_proj"] == "16.0"
    assert "model.layers.0 input_layernorm" not in cells(documents[1])


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_names_are_escaped(hostile):
    tensors = [tensor(f"model.layers.0.{hostile}.weight"), tensor(hostile), tensor(f"{hostile}.norm", kept=hostile)]
    document = quantize_page(report_of(tensors))
    parsed, tame = Parsed(document), Parsed(quantize_page(report_of([tensor("model.layers.0.a.weight"), tensor("b")])))
    shown = hostile.replace("\u202e", "\\u202e")
    assert [row[0] for row in parsed.in_order[-1][1:]] == [t.name.replace("\u202e", "\\u202e") for t in tensors]
    assert any(f"model.layers.0 {shown}: " in title for title in parsed.titles)
    assert set(parsed.tags) <= {*tame.tags, "p"}
    assert parsed.tags.count("script") == 1
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]


def test_characters_invalid_in_utf8_or_xml_are_written_as_escapes():
    document = quantize_page(report_of([tensor("model.layers.0.a\x00b\ud800c\x1b.weight")]))
    document.encode()
    assert "model.layers.0.a\\x00b\\ud800c\\x1b.weight" in [row[0] for row in Parsed(document).in_order[-1]]
    for svg in re.findall(r"<svg.*?</svg>", document, flags=re.DOTALL):
        ElementTree.fromstring(svg)


def test_parts_escape_their_text():
    evil = "<i>&'\""
    made = [
        page(evil), section(evil, paragraph(evil)), facts([(evil, evil)]), table([evil], [[evil]]),
        table(["n"], [[Number(1.0, evil)]]), figure(evil, Html("")),
    ]  # fmt: skip
    assert all("<i>" not in part and str(text(evil)) in part for part in made)


def test_a_table_row_of_a_different_length_is_refused():
    with pytest.raises(ValueError, match="another length"):
        table(["a", "b"], [["1"]])


def test_pages_load_nothing():
    document = quantize_page(model(weighted=0.05))
    parsed = Parsed(document)
    assert not {"link", "img", "image", "iframe", "object", "a"} & set(parsed.tags)
    assert not [v for k, v in parsed.attributes if k in {"src", "href", "xlink:href"} and not (v or "").startswith("#")]
    assert "@import" not in document
    assert not re.search(r"url\((?!#)", document)


def test_page_bytes_depend_on_neither_hash_seed_nor_matplotlibrc(tmp_path):
    code = (
        "import hashlib, runpy, sys\n"
        "there = runpy.run_path(sys.argv[1])\n"
        "print(hashlib.sha256(there['quantize_page'](there['model'](weighted=0.05)).encode()).hexdigest())"
    )
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsvg.fonttype: path\naxes.facecolor: red\n")
    seen = set()
    for seed, rc in (("1", ""), ("2", str(tmp_path / "matplotlibrc"))):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'fixtures'}"}
        environment |= {"MATPLOTLIBRC": rc} if rc else {}
        done = subprocess.run([sys.executable, "-c", code, __file__], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout)
    assert len(seen) == 1
    assert len(seen.pop().strip()) == 64


def test_identifiers_on_a_page_with_several_figures_are_unique():
    found = [v for k, v in Parsed(quantize_page(model(weighted=0.05))).attributes if k == "id"]
    assert found
    assert len(found) == len(set(found))


def test_without_matplotlib_the_hint_names_the_package_to_install(tmp_path):
    code = (
        "import sys, pathlib\n"
        "sys.modules['matplotlib'] = None\n"
        "from adaptkit.cli.pages import prepare\n"
        "from adaptkit.errors import UsageError\n"
        "prepare(None)\n"
        "try: prepare(pathlib.Path(sys.argv[1]))\n"
        "except UsageError as error: print(error.exit_code, error.hint, '|', error.message)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "page.html"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("2 pip install '.[report]' in adaptkit's checkout")
    assert "needs matplotlib" in done.stdout


def test_unwritable_page_paths_are_refused_before_the_work(tmp_path):
    prepare(tmp_path / "page.html")
    for path in (tmp_path, tmp_path / "absent" / "page.html"):
        with pytest.raises(UsageError, match="cannot write a file there"):
            prepare(path)
    with pytest.raises(DiskError, match="cannot be written: Is a directory"):
        write_whole(tmp_path, "page")
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_written_completely_or_not_at_all(tmp_path):
    (tmp_path / "report").write_text("old")
    (tmp_path / "link").symlink_to("report")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "report").read_text() == "new"
    assert (tmp_path / "link").is_symlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(DiskError, match="cannot be written: File too large") as caught:
            write_whole(tmp_path / "report", "newer" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "ulimit -f" in caught.value.hint
    assert (tmp_path / "report").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"report", "link"}
    for name in ("s-10:30.jsonl", "a\\b", "two\nlines"):
        write_whole(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    (tmp_path / "mine.partial").write_text("mine")
    write_whole(tmp_path / "mine", "text")
    assert (tmp_path / "mine.partial").read_text() == "mine"
    read, write = os.pipe()
    write_whole(Path(f"/dev/fd/{write}"), "through a pipe")
    assert os.read(read, 99) == b"through a pipe"
    os.close(read)
    os.close(write)
    with pytest.raises(DiskError, match="No space left"):
        write_whole(Path("/dev/full"), "page")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.7.mlp.down_proj.weight", ("model.layers", 7, "mlp.down_proj")),
        ("h.0.attn.c_attn.weight", ("h", 0, "attn.c_attn")),
        ("model.layers.3.block_sparse_moe.experts.17.w1.weight", ("model.layers", 3, "block_sparse_moe.experts.*.w1")),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", ("encoder.block", 2, "layer.*.SelfAttention.q")),
        ("model.layers.3.mlp.experts.down_proj", ("model.layers", 3, "mlp.experts.down_proj")),
        ("features.4.weight", ("features", 4, "weight")),
        ("4.weight", ("layers", 4, "weight")),
        ("lm_head.weight", ("", 0, "lm_head")),
        ("layer１.²", ("", 0, "layer１.²")),
    ],
)
def test_stack_layer_and_module_are_parsed_from_tensor_names(name, expected):
    where = place(name)
    assert (where.stack, where.layer, where.module) == expected


def test_experts_share_a_cell_with_their_mean():
    errors = {f"model.layers.1.experts.{e}.w1.weight": e / 10 for e in range(5)}
    (grid,) = grids(errors)
    (entry,) = grid.entries.values()
    assert (entry.mean, entry.largest, entry.count) == (pytest.approx(0.2), 0.4, 5)
    document = quantize_page(report_of([tensor(name, error) for name, error in errors.items()]))
    assert cells(document)["model.layers.1 experts.*.w1"] == "20.0 (mean of 5, at most 40.0)"


def test_rows_are_in_numeric_order_and_stacks_are_separate():
    names = [f"{stack}.{n}.q.weight" for stack in ("encoder.layers", "decoder.layers") for n in (10, 2, 0)]
    made = grids(dict.fromkeys([*names, "lm_head.weight"], 1.0))
    assert [(grid.stack, grid.rows) for grid in made] == [
        ("decoder.layers", ("0", "2", "10")), ("encoder.layers", ("0", "2", "10")), ("", ("lm_head",)),
    ]  # fmt: skip


def test_names_without_a_layer_become_rows_and_omitted_ones_are_counted():
    report = report_of([tensor(f"block_{chr(97 + i % 26)}{i // 26 * 'x'}", 0.05 + i / 1000) for i in range(60)])
    document = quantize_page(report)
    largest = sorted(report.tensors, key=lambda t: -t.relative_error)[:48]
    assert set(cells(document)) == {t.name for t in largest}
    assert "12 smaller values of modules without a layer number" in document


@pytest.mark.parametrize("tensors", [[], [tensor("n.weight", kept="norm")], [tensor("model.layers.0.q.weight", 0.0)]])
def test_reports_with_few_tensors_make_valid_pages(tensors):
    document = quantize_page(report_of(tensors))
    assert len(Parsed(document).in_order[-1]) == 1 + len(tensors)


def test_the_page_of_a_dry_run_has_no_figures():
    planned = TensorReport("model.layers.0.q.weight", (64, 64), "nf4", 4.127, 8192, 2113)
    document = quantize_page(report_of([planned]))
    assert "<svg" not in document
    assert planned.name in [row[0] for row in Parsed(document).in_order[-1]]


def test_a_large_model_makes_a_small_page():
    document = quantize_page(model(layers=128, modules=[f"mlp.part_{chr(97 + i)}" for i in range(12)]))
    assert len(cells(document)) == 128 * 12
    assert len(document.encode()) < 1_000_000


def test_curves_label_every_line_and_use_the_text_colour_of_the_page():
    names = ["train", "_hidden", "$x_1$"]
    svg = figures.curves({name: [(1, 2.0), (2, 0.5)] for name in names}, "step", "loss", logarithmic=True)
    shown = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert set(names) <= set(shown)
    assert {"step", "loss", "0.5", "1", "2"} <= set(shown)
    assert "currentColor" in svg
    assert not [t for t in shown if "mathdefault" in (t or "")]


def test_a_histogram_counts_all_values():
    svg = figures.histogram([1.0, 1.0, 2.0], "error", "tensors")
    bars = re.findall(r'd="M [\d.]+ ([\d.]+) +L [\d.]+ [\d.]+ +L [\d.]+ ([\d.]+) [^"]+"[^>]*fill: #3b6fb6', svg)
    heights = sorted(float(bottom) - float(top) for bottom, top in bars)
    assert (len(heights), heights[-3]) == (30, 0)
    assert heights[-1] == pytest.approx(2 * heights[-2], rel=1e-4)


def test_a_browser_shows_the_page_and_sorts_its_table_without_console_messages(tmp_path):
    report = model(layers=12)
    write_whole(tmp_path / "page.html", quantize_page(report))
    found = probe(tmp_path)
    assert found["cells"] == report.quantized
    assert found["smallest"] >= 7
    assert found["overflow"] <= 0, "a phone scrolls the page sideways"
    assert found["said"] == found["title"] == "model.layers.0 mlp.down_proj: 8.33"
    errors = sorted(t.relative_error for t in report.tensors if t.format)
    unknown = [None] * (len(report.tensors) - len(errors))
    assert found["up"] == pytest.approx([*errors, *unknown])
    assert found["down"] == pytest.approx([*errors[::-1], *unknown])


def test_a_browser_blocks_scripts_and_images_that_are_not_the_pages_own(tmp_path):
    """The second line of defence; it also shows that console messages would be seen by the test above."""
    intruder = Html('<script>document.title = "taken over"</script><img src="https://example.invalid/x.png">')
    write_whole(tmp_path / "page.html", page("safe", intruder))
    document, console = browse(tmp_path, "page.html")
    assert "<title>safe</title>" in document
    assert sum("Content Security Policy" in line for line in console) == 2


def test_upgrades_are_listed_in_their_order():
    upgrades = (
        Upgrade("model.layers.3.mlp.up_proj", "blocks of 32", 2048, 0.5),
        Upgrade("x.<y>", "16 bits", 4096, 0.25),
    )
    report = dataclasses.replace(report_of([tensor("model.layers.3.mlp.up_proj.weight")]), upgrades=upgrades)
    parsed = Parsed(quantize_page(report))
    assert [["model.layers.3.mlp.up_proj", "blocks of 32", "2,048", "0.5"], ["x.<y>", "16 bits", "4,096", "0.25"]] in [
        rows[1:] for rows in parsed.in_order
    ]
