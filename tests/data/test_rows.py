"""Rows are read unchanged from every kind of file, and errors name the file and the line or row."""

import csv
import gzip
import json
import os
import re
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.data.conversation import read_example
from adaptkit.data.rows import is_on_hub, read_rows
from adaptkit.errors import DataError, NetworkError

ROWS = [{"instruction": "Name it, please.", "output": 'the "Rhine"\nriver'}, {"instruction": "NA", "output": "007"}]


def write(path, rows):
    if path.suffix in (".jsonl", ".NDJSON"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("suffix", "places"),
    [
        (".jsonl", ["line 1", "line 2"]),
        (".NDJSON", ["line 1", "line 2"]),
        (".json", ["row 1", "row 2"]),
        (".csv", ["line 2", "line 4"]),
        (".TSV", ["line 2", "line 4"]),
        (".parquet", ["row 1", "row 2"]),
    ],
)
def test_rows_are_read_unchanged_with_their_places(suffix, places, tmp_path):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    assert list(read_rows(path)) == [(f"{path}, {place}", row) for place, row in zip(places, ROWS, strict=True)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".TSV"])
def test_a_compressed_file_has_the_rows_and_places_of_the_uncompressed_one(suffix, tmp_path):
    path, many = tmp_path / f"rows{suffix}", [row | {"number": str(n)} for n in range(2000) for row in ROWS]
    content = write(path, many).read_bytes()
    rows = [(where.removeprefix(str(path)), row) for where, row in read_rows(path)]
    packed = tmp_path / f"packed{suffix}.{'GZ' if suffix.isupper() else 'gz'}"
    packed.write_bytes(gzip.compress(content))
    assert [(where.removeprefix(str(packed)), row) for where, row in read_rows(packed)] == rows
    assert not is_on_hub(f"org/{packed.name}")
    whole, cannot = packed.read_bytes(), "cannot be read ("
    for damaged, said in (
        (whole[:-9], cannot),
        (content, "is not compressed with gzip, or is damaged"),
        (whole[:40] + bytes(99) + content, cannot),
    ):
        packed.write_bytes(damaged)
        with pytest.raises(DataError, match=re.escape(f"{packed}: {said}")):
            list(read_rows(packed))


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), min_size=2, max_size=6))
def test_any_text_is_read_back_from_csv(tmp_path_factory, texts):
    path = write(tmp_path_factory.mktemp("csv") / "rows.csv", [{"a": text, "b": texts[0]} for text in texts])
    assert [row["a"] for _, row in read_rows(path)] == texts


def test_long_cells_are_read_without_changing_the_global_limit_of_csv(tmp_path):
    limit = csv.field_size_limit()
    path = write(tmp_path / "rows.csv", [{"text": "x" * 200_000}])
    assert [len(row["text"]) for _, row in read_rows(path)] == [200_000]
    assert csv.field_size_limit() == limit


def test_tables_are_read_row_by_row(tmp_path):
    """Memory holds few rows, and an error in a late row is raised after the earlier rows are read."""
    path = write(
        tmp_path / "rows.csv", [{"text": f"a text of {number} words", "n": number} for number in range(50_000)]
    )
    with path.open("a") as file:
        file.write("only one\n")
    tracemalloc.start()
    try:
        rows, limit = read_rows(path), csv.field_size_limit()
        assert sum(csv.field_size_limit() == limit for _, (_, row) in zip(range(50_000), rows, strict=False)) == 50_000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 2
    finally:
        tracemalloc.stop()
    with pytest.raises(DataError, match=r"line 50002: expected 2 cells, as in the header; found 1"):
        next(rows)


def test_json_may_hold_its_rows_under_data_or_one_per_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert [row for _, row in read_rows(path)] == ROWS
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [where for where, _ in read_rows(path)] == [f"{path}, line 1", f"{path}, line 2"]
    path.write_text(json.dumps(ROWS[0]) + "\n")
    assert list(read_rows(path)) == [(f"{path}, line 1", ROWS[0])]
    path.write_text(json.dumps({"data": "x", "output": "y"}))
    assert [row for _, row in read_rows(path)] == [{"data": "x", "output": "y"}]
    path.write_text(json.dumps({"rows": ROWS}, indent=1))
    with pytest.raises(DataError, match="expected a list of rows, found the keys rows"):
        list(read_rows(path))


def test_a_byte_order_mark_crlf_and_line_separators_in_strings_are_read(tmp_path):
    row = '{"text": "one\u2028line\u0085"}\r\n'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(("\ufeff" + row + "\r\n" + row).encode())
    assert list(read_rows(path)) == [(f"{path}, line {number}", {"text": "one\u2028line\u0085"}) for number in (1, 3)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": 1}\n{not json', ", line 2: not JSON"),
        ("rows.jsonl", b'{"a": 1}\n[1, 2]', ", line 2: expected an object, found list"),
        ("rows.jsonl", b'{"a": "' + b"\xff", ", line 1: not UTF-8 (invalid start byte)"),
        ("rows.jsonl", b'{"n": ' + b"9" * 5000 + b"}", ", line 1: not JSON"),
        ("rows.jsonl", b'{"n": ' + b"[" * 100_000, ", line 1: not JSON"),
        ("rows.jsonl", b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}', ", line 2: not JSON (the key 'a' appears twice)"),
        ("rows.json", b'[{"a": {"b": 1, "b": 2}}]', ": not JSON (the key 'b' appears twice)"),
        ("rows.json", b'[{"a": 1}, 5]', ", row 2: expected an object, found int"),
        ("rows.json", b'{"rows":\n[]}', ": expected a list of rows, found the keys rows"),
        ("rows.json", b"5", ": expected a list of rows, found int"),
        ("rows.json", b'[{"a": 1},', ": not JSON"),
        ("rows.json", b'{"a": 1}\n{"a"', ", line 2: not JSON"),
        ("rows.csv", b'a,b\n1,2\n\n3,"x\ny",4\n', ", line 4: expected 2 cells, as in the header; found 3"),
        ("rows.csv", b"a,b\n1\n", ", line 2: expected 2 cells, as in the header; found 1"),
        ("rows.csv", b"a,a\n1,2\n", ", line 1: two columns are named 'a'"),
        ("rows.csv", b"a;b\n1;2\n", ", line 1: found a single column, 'a;b'"),
        ("rows.tsv", b"a,b\n1,2\n", ", line 1: found a single column, 'a,b'"),
        ("rows.csv", b'a,b\n"1"2,3\n', ": not csv"),
        ("rows.tsv", b'a\tb\n"1"2\t3\n', ": not tsv"),
        ("rows.csv", b"a,b\n1,\xff\n", ", line 2: not UTF-8 (invalid start byte)"),
        ("rows.parquet", b"PAR1 or not", ", after row 0: not Parquet"),
        ("rows.parquet.gz", b"", ": expected a data file"),
        (".gz", b"", ": expected a data file"),
        ("rows.jsonl", gzip.compress(b'{"a": 1}', mtime=0), ": is compressed with gzip"),
        ("rows.csv", gzip.compress(b"a,b", mtime=0), ": is compressed with gzip"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": "\xff"}', mtime=0), ", line 1: not UTF-8 (invalid start byte)"),
        ("rows.jsonl.gz", b'{"a": 1}', ": is not compressed with gzip, or is damaged"),
        (
            "rows.xlsx",
            b"",
            ": expected a data file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet) or org/name on the Hub",
        ),
    ],
)
def test_a_malformed_row_or_file_is_named_by_file_and_place(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / name}{message}")) as raised:
        list(read_rows(tmp_path / name))
    assert raised.value.hint
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            "{" + ",".join(f'"{n}":1' for n in range(300_000)) + ',"299999":2}',
            "key '299999' appears twice",
        ),
        ("rows.csv", ",".join(map(str, range(300_000))) + ",299999\n", "columns are named '299999'"),
    ],
    ids=["keys", "columns"],
)
def test_names_that_occur_twice_among_very_many_are_found_in_linear_time(name, content, message, tmp_path):
    """Counting each name by itself would take an hour."""
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_small_compressed_file_cannot_exhaust_memory_with_one_line(suffix, tmp_path):
    path, piece = tmp_path / f"rows{suffix}.gz", b"a" * (1 << 24)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"text\n" if suffix == ".csv" else b'{"text": "first"}\n')
        file.writelines(piece for _ in range(17))
    rows = read_rows(path)
    if suffix == ".jsonl":
        assert next(rows)[1] == {"text": "first"}
    with pytest.raises(DataError, match=r"gz, line 2: longer than 256 MiB"):
        next(rows)


@pytest.mark.parametrize("name", ["absent.json", "absent.csv", "absent.parquet", "folder.jsonl"])
def test_a_file_that_cannot_be_opened_is_named_in_the_error(name, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / name}: cannot be read")):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_a_pipe_is_refused_and_not_waited_for(name, tmp_path):
    """Data is read and hashed; the second pass would wait forever for a writer."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=r"is a pipe, which can be read only once"):
        list(read_rows(tmp_path / name))


def test_null_columns_of_parquet_are_kept_and_null_fields_of_their_objects_are_not(tmp_path):
    rows = [{"question": "a", "answer": None, "more": {"x": 1, "y": None}}, {"question": "b", "answer": "c"}]
    found = [row for _, row in read_rows(write(tmp_path / "rows.parquet", rows))]
    assert found[0] == {"question": "a", "answer": None, "more": {"x": 1}}
    with pytest.raises(DataError, match="here: answer is null"):
        read_example(found[0], "here")


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path):
    """pyarrow gives rows with the cells of the last one only."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    columns = [pyarrow.array([text]) for text in ("first", "second", "question")]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["output", "output", "instruction"]), path)
    with pytest.raises(DataError, match=re.escape(f"{path}: two columns are named 'output'")) as raised:
        list(read_rows(path))
    assert raised.value.hint == "rename one of them"


@pytest.mark.parametrize(
    ("source", "on_hub"),
    [
        ("org/name", True),
        ("org/name@refs/pr/1", True),
        ("org/name/config@main:train_sft", True),
        ("data/rows.jsonl", False),
        ("data/rows.JSONL", False),
        ("data/more/rows.md", False),
        ("org/name-v1.5", True),
        ("org/name.en", True),
        ("./org/name", False),
        ("/org/name", False),
        ("name", False),
        ("a/b/c/d", False),
    ],
)
def test_names_on_the_hub_are_distinguished_from_files(source, on_hub):
    assert is_on_hub(source) is on_hub


def test_an_existing_folder_takes_precedence_over_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_on_hub("org/name")


def test_a_name_with_a_suffix_is_a_file_if_its_folder_exists(tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_on_hub("org/rows.jsnl")
    assert is_on_hub("other/rows.jsnl")
    for name in ("org/name", "org/name-v1.5", "org/name@v1.0:train", "org/name:rows.part"):
        assert is_on_hub(name)


def test_a_hub_that_does_not_answer_is_a_network_error(tmp_path):
    """HF_HUB_OFFLINE is set for all tests, so no request is sent."""
    pytest.importorskip("datasets")
    with pytest.raises(NetworkError, match="org/name: no such file, and the Hub does not answer"):
        list(read_rows("org/name@v1:test"))


def test_local_files_need_no_network_and_no_cache(tmp_path):
    """Read in a process that cannot connect sockets and whose home folder is empty and stays so."""
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        write(tmp_path / f"rows{suffix}", ROWS)
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise RuntimeError('a socket')\n"
        "socket.socket.connect = refuse\n"
        "from adaptkit.data.rows import read_rows\n"
        "print(sum(len(list(read_rows(name))) for name in sys.argv[1:]))\n"
        "print('datasets' in sys.modules, 'torch' in sys.modules)\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(path) for path in sorted(tmp_path.glob("rows.*")))],
        env=environment | {"HOME": str(home)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("8\nFalse False\n", "")
    assert list(home.iterdir()) == []


def test_a_missing_file_of_an_unknown_kind_is_called_missing(tmp_path):
    for name, hint in (("rows.jsnl", "check the path: there is no such file"), ("rows.xlsx", "rename or convert it")):
        (tmp_path / "rows.xlsx").touch()
        with pytest.raises(DataError, match="expected a data file") as raised:
            list(read_rows(tmp_path / name))
        assert raised.value.hint == hint
