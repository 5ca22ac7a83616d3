"""All pages: text escaped, self-contained, bytes reproducible, and readable in a browser, also on a phone."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import page_reports
import pytest
from html_pages import Parsed, browse, probe
from markupsafe import Markup
from page_reports import PAGES

from adaptkit.cli.output import check_page
from adaptkit.cli.pages.page import render
from adaptkit.cli.release_view import summary
from adaptkit.errors import UsageError
from adaptkit.pipeline.report import InputReport, OutputReport, StepResult

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = (
    "<script>alert(1)</script>", "\"onmouseover='alert(1)'", "</title></style>", "a&amp;b", "]]>", "--><b>",
    "$\\frac{x$", "{{ 7*7 }}{% raw %}", "\u202etxt", "\x1b[31m", "\udcff", "日本", "_private",
)  # fmt: skip


@pytest.mark.parametrize("kind", PAGES)
def test_hostile_names_are_escaped_and_invisible_characters_shown(kind):
    document = PAGES[kind](HOSTILE)
    document.encode()
    parsed, tame = Parsed(document), Parsed(PAGES[kind](["plain", "other"]))
    assert set(parsed.tags) <= set(tame.tags)
    assert parsed.tags.count("script") == 1
    assert {name for name, _ in parsed.attributes} <= {name for name, _ in tame.attributes}
    for name in HOSTILE:
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
        assert name == "</title></style>" or shown in parsed.text, name
    assert not re.search("[\x1b\u202e\udcff]", document)
    for svg in re.findall(r"<svg.*?</svg>", document, flags=re.DOTALL):
        ElementTree.fromstring(svg)


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_loads_nothing_and_its_identifiers_are_unique(kind):
    document = PAGES[kind](["plain", "other"])
    parsed = Parsed(document)
    assert not {"link", "img", "image", "iframe", "object", "a"} & set(parsed.tags)
    assert not [v for k, v in parsed.attributes if k in {"src", "href", "xlink:href"} and not (v or "").startswith("#")]
    assert "@import" not in document
    assert not re.search(r"url\((?!#)", document)
    identifiers = [value for name, value in parsed.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    assert bool(identifiers) == (kind != "evaluate")


def test_page_bytes_depend_on_neither_hash_seed_nor_matplotlibrc(tmp_path):
    code = (
        "import hashlib; from page_reports import PAGES\n"
        "for kind in PAGES: print(hashlib.sha256(PAGES[kind](['a', 'b']).encode()).hexdigest())"
    )
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsvg.fonttype: path\naxes.facecolor: red\n")
    seen = set()
    for seed, rc in (("1", ""), ("2", str(tmp_path / "matplotlibrc"))):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'fixtures'}"}
        environment |= {"MATPLOTLIBRC": rc} if rc else {}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout)
    assert len(seen) == 1
    assert len(seen.pop().split()) == len(PAGES)


@pytest.mark.parametrize("kind", PAGES)
def test_a_browser_shows_the_page_at_phone_width_without_console_messages(kind, tmp_path):
    made = {
        "quantize": lambda: page_reports.of_quantization(page_reports.model(layers=12)),
        "adapters": lambda: page_reports.of_difference(page_reports.adapters(page_reports.named(layers=12))),
        "checkpoints": lambda: page_reports.of_difference(page_reports.checkpoints(page_reports.named(layers=12))),
        "evaluate": lambda: PAGES["evaluate"](["plain"]),
    }
    document = made[kind]()
    (tmp_path / "page.html").write_text(document, encoding="utf-8")
    found, cells = probe(tmp_path), [name for drawn in Parsed(document).maps.values() for name in drawn.items()]
    assert len(found["cells"]) == len(cells)
    assert min(found["cells"], default=7) >= 7
    assert min(found["pictures"], default=41) > 40
    assert found["overflow"] <= 0, "a phone scrolls the page sideways"
    assert found["overlaps"] == 0, "labels on labels"
    if cells:
        assert found["said"] == ": ".join(cells[0])
    known = [value for value in found["before"] if value is not None]
    unknown = [None] * (len(found["before"]) - len(known))
    assert found["up"] == [*sorted(known), *unknown]
    assert found["down"] == [*sorted(known, reverse=True), *unknown]
    assert found["up"] != found["down"]


def test_a_browser_blocks_scripts_and_images_that_are_not_the_pages_own(tmp_path):
    """The second line of defence; it also shows that console messages would be seen by the test above."""
    intruder = Markup('<script>document.title = "taken over"</script><img src="https://example.invalid/x.png">')
    values = {"rows": [], "labels": [], "columns": [], "measures": [], "prompts": [], "questions": 0, "notes": []}
    page = render("evaluate.html", name="safe", forgetting=[intruder], **values)
    (tmp_path / "page.html").write_text(page)
    document, console = browse(tmp_path, "page.html")
    assert "<title>Evaluation of safe</title>" in document
    assert sum("Content Security Policy" in line for line in console) == 2


def test_names_in_the_summary_of_a_run_stay_text_in_their_cells():
    evil = "a | b\n<b>[x](y) @all \\ `"
    step = StepResult(
        evil, evil, (), (), (), "done", 1.0, evil, None, (OutputReport(evil, evil, 5, "ab" * 32),),
        {"repo_id": evil, "commit": "cd" * 20, "manifest_sha256": "ef" * 32},
    )  # fmt: skip
    page = summary(evil, [InputReport(evil, evil, None, "ab" * 32, 5, True)], [step], evil)
    assert not re.search(r"<|@|(?<!\\)\[", page)
    heads = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(heads) == 12
    for line in heads:
        assert len(re.findall(r"(?<!\\)\|", line)) in (4, 5, 6), line


def test_unwritable_page_paths_and_a_missing_matplotlib_are_refused_before_the_work(tmp_path, monkeypatch):
    check_page(None)
    check_page(tmp_path / "page.html")
    (tmp_path / "page.html").write_text(PAGES["evaluate"](["plain"]))
    check_page(tmp_path / "page.html")
    (tmp_path / "other.html").write_text("<html>")
    for path, why in ((tmp_path, "cannot write a file"), (tmp_path / "other.html", "is not a page of adaptkit")):
        with pytest.raises(UsageError, match=why):
            check_page(path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    check_page(None)
    check_page(tmp_path / "page.html", pictures=False)
    with pytest.raises(UsageError, match="needs matplotlib") as caught:
        check_page(tmp_path / "page.html")
    assert caught.value.hint.startswith("pip install '.[report]' in adaptkit's checkout")


def test_quantize_writes_its_page_beside_its_table(run_cli, llama, tmp_path):
    done = run_cli("quantize", llama, "-o", tmp_path / "nf4", "--html", tmp_path / "page.html")
    assert (done.code, done.stderr) == (0, "")
    parsed = Parsed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert f"manifest sha256  {parsed.facts['manifest sha256']}" in done.stdout
    assert len(parsed.tables["Largest relative errors"]) == 11


def test_files_that_are_not_modules_are_in_the_package():
    package = ROOT / "adaptkit"
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["adaptkit"]
    found = {path for path in package.rglob("*.*") if path.suffix not in {".py", ".pyc", ".nbi", ".nbc"}}
    assert found == {path for pattern in listed for path in package.glob(pattern) if path.suffix != ".py"}
