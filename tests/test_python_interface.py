"""The public functions, called as in a notebook: with strings for paths."""

import ast
import dataclasses
import inspect
import json
import re
import shutil
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny

import adaptkit
from adaptkit.errors import UsageError


def test_every_function_accepts_strings_for_paths(llama, adapter, tmp_path):
    """All steps of a release; all other tests make these calls with ``Path``s."""
    base, own, out = str(llama), str(adapter), str(tmp_path)
    rows = str(tiny.write_instructions(tmp_path / "rows.jsonl", rows=8))
    calibration = adaptkit.Calibration(files=rows, tokens=64, window=16, init_rank=2)
    adaptkit.quantize(base, f"{out}/nf4", adaptkit.QuantizeOptions(calibration=calibration), companion=f"{out}/begun")
    adaptkit.dequantize(f"{out}/nf4", f"{out}/plain")
    config = adaptkit.TrainConfig(base=f"{out}/nf4", data=[rows], steps=1, rank=2)
    adaptkit.train(config, f"{out}/trained", note=lambda text: None)
    assert adaptkit.merge(base, own, f"{out}/merged").merged
    assert adaptkit.unmerge(f"{out}/merged", own, f"{out}/back").identical
    adaptkit.extract(f"{out}/back", f"{out}/merged", f"{out}/extracted", adaptkit.ExtractOptions(rank=4))
    adaptkit.resize(own, f"{out}/resized", adaptkit.ResizeOptions(rank=1))
    adaptkit.stack([own, own], f"{out}/stacked")
    assert adaptkit.diff(own, own).same
    assert adaptkit.check(own, ["peft"], base).kind == "adapter"
    assert adaptkit.inspect(own).kind == "adapter"
    assert adaptkit.plan(base).architecture == "LlamaForCausalLM"
    found = adaptkit.verify(f"{out}/merged", adaptkit.VerifyOptions(parents=[base, own]))
    assert {ancestor.state for ancestor in found.parents} == {"verified"}
    others = str(tiny.write_instructions(tmp_path / "others.jsonl", rows=8, seed=1))
    options = adaptkit.EvaluateOptions(shots=1, shots_from=others)
    assert adaptkit.evaluate(f"{out}/nf4", f"{out}/trained", rows).loss > 0
    assert len(adaptkit.compare(base, (), rows, options, text=rows, reference=base).models) == 2
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: release\nsources:\n  base: {path: back}\nsteps:\n  nf4: {quantize: base}\n")
    adaptkit.run(str(recipe), adaptkit.RunOptions(work=f"{out}/work"))
    assert list((tmp_path / "work").glob("*/nf4/config.json"))


def test_a_single_path_is_accepted_where_several_are(llama, adapter, tmp_path):
    """A string is a sequence too, of characters."""
    options = adaptkit.MergeOptions(undo=False)
    for name, adapters in ("text", str(adapter)), ("path", adapter), ("list", [str(adapter)]), ("tuple", (adapter,)):
        adaptkit.merge(str(llama), adapters, tmp_path / name, options)
    one, *others = (
        Path(tmp_path, name, "model.safetensors").read_bytes() for name in ("text", "path", "list", "tuple")
    )
    assert others == [one] * 3


PATHS = {
    "adopt": ("source", "output", "base"),
    "check": ("path", "base"),
    "compare": ("bases", "adapters", "data", "text", "reference"),
    "dequantize": ("source", "output"),
    "diff": ("first", "second"),
    "evaluate": ("base", "adapter", "data", "text", "reference"),
    "extract": ("tuned", "base", "output"),
    "inspect": ("path",),
    "merge": ("base", "adapters", "output"),
    "plan": ("model",),
    "publish": ("path",),
    "pull": ("output",),
    "quantize": ("source", "output", "companion"),
    "resize": ("adapter", "output"),
    "resolve_source": ("source",),
    "run": ("recipe",),
    "stack": ("adapters", "output"),
    "train": ("output",),
    "unmerge": ("merged", "adapters", "output"),
    "verify": ("path",),
}
"""Arguments that are paths."""
MAY_BE_NONE = {
    "base of adopt", "base of check", "adapter of evaluate", "adapters of unmerge", "companion of quantize", "reference"
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_what_is_no_path_is_refused_by_the_name_of_its_argument(name, tmp_path, monkeypatch):
    """It used to raise a TypeError from deep inside, or a dict's keys were taken for paths."""
    monkeypatch.chdir(tmp_path)
    function = getattr(adaptkit, name)
    config = adaptkit.TrainConfig(base="in", data=["rows"])
    for wrong in PATHS[name]:
        for given in (None, 3, 2.5, True, {}, {"a": 1}, object(), b"in", [b"in"], [3], [None], ["in", 3], [["in"]], ""):
            if given is None and ({wrong, f"{wrong} of {name}"} & MAY_BE_NONE):
                continue
            needed = [
                parameter.name
                for parameter in inspect.signature(function).parameters.values()
                if parameter.default is parameter.empty
            ]
            arguments = dict.fromkeys(needed, "in") | ({"config": config} if name == "train" else {})
            with pytest.raises(UsageError, match=rf"^{wrong}: (must be a path, found \w+|the path is empty)\n"):
                function(**arguments | {wrong: given})
    assert list(tmp_path.iterdir()) == []


WRONG_TYPES = [
    ("EvaluateOptions", {"prompts": 3}, "a list, each item text"),
    ("EvaluateOptions", {"prompts": ["a", None]}, "text"),
    ("EvaluateOptions", {"chat_template_kwargs": 3}, "names, each with text or"),
    ("EvaluateOptions", {"shots": 1, "shots_from": {}}, "a list, each item a path"),
    ("ExtractOptions", {"rank": 1, "target": {"a": 1}}, "a list, each item text"),
    ("ExtractOptions", {"rank": 2, "seed": 0.5}, "a whole number"),
    ("ExtractOptions", {"rank": 2, "oversampling": float("inf")}, "a whole number"),
    ("ExtractOptions", {"energy": []}, "a number"),
    ("PlanOptions", {"targets": [3]}, "text"),
    ("PlanOptions", {"optimizer": {}}, "text"),
    ("PlanOptions", {"rank": "4"}, "a whole number"),
    ("PublishOptions", {"tag": 3}, "text"),
    ("PullOptions", {"manifest_sha256": b"0"}, "text"),
    ("QuantizeOptions", {"format": None}, "text"),
    ("QuantizeOptions", {"skip": [3]}, "text"),
    ("QuantizeOptions", {"double_quant": "no"}, "true or false"),
    ("QuantizeOptions", {"block_size": "64"}, "a whole number"),
    ("Calibration", {"files": [3]}, "a path"),
    ("MergeOptions", {"undo": "false"}, "true or false"),
    ("MergeOptions", {"undo": None}, "true or false"),
    ("MergeOptions", {"weights": ("much",)}, "a number"),
    ("ResizeOptions", {"rank": "1"}, "a whole number"),
    ("ResizeOptions", {"rank": 2.5}, "a whole number"),
    ("ResizeOptions", {"energy": 10**400}, "a number"),
    ("RunOptions", {"work": 3}, "a path"),
    ("Signer", {"private_key": 3}, "a path"),
    ("StackOptions", {"energy": "much"}, "a number"),
    ("StackOptions", {"settings": None}, "names, each with a whole number or a number"),
    ("StackOptions", {"weights": {1: 2}}, "a list, each item a number"),
    ("StackOptions", {"weights": [1, "much"]}, "a number"),
    ("Trust", {"public_key": {}}, "a path"),
    ("VerifyOptions", {"parents": [3]}, "a path"),
    ("VerifyOptions", {"manifest_sha256": 3}, "text"),
    ("VerifyOptions", {"threads": "2"}, "a whole number"),
    ("PublishOptions", {"signer": 3}, "keys and values"),
    ("QuantizeOptions", {"calibration": "text"}, "keys and values"),
]


def test_an_option_of_the_wrong_type_is_refused_by_name():
    """Some used to raise a TypeError, even after work was done, and "no" counted as true."""
    for options, given, expected in WRONG_TYPES:
        with pytest.raises(UsageError, match=rf"^{list(given)[-1]}(\.\d+)?: is .*; expected {expected}"):
            getattr(adaptkit, options)(**given)


def test_threads_and_repositories_have_their_types(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (lambda: adaptkit.diff("a", "b", threads="2"), lambda: adaptkit.unmerge("a", None, "b", threads={})):
        with pytest.raises(UsageError, match=r"^threads: is .*; expected a whole number"):
            call()
    for call in (lambda: adaptkit.publish("a", None), lambda: adaptkit.pull(3, "b")):
        with pytest.raises(UsageError, match=r"^repo_id: must be text, found "):
            call()
    with pytest.raises(UsageError, match=r"^targets: must be text, found None"):
        adaptkit.check(tmp_path, None)


def test_a_secret_of_the_wrong_type_is_not_shown():
    for given in {"identity_token": b"secret"}, {"password": "secret", "private_key": "key.pem"}:
        with pytest.raises(UsageError) as caught:
            adaptkit.Signer(**given)
        assert "secret" not in caught.value.message


def test_unmerge_takes_none_for_adapters_that_the_merged_model_contains(llama, adapter, tmp_path):
    options = adaptkit.MergeOptions(embed_adapter=True)
    adaptkit.merge(llama, adapter, tmp_path / "merged", options)
    assert adaptkit.unmerge(tmp_path / "merged", None, tmp_path / "back").identical


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("adopt", ("in", "out")),
        ("compare", ("in", (), "rows")),
        ("dequantize", ("in", "out")),
        ("evaluate", ("in", None, "rows")),
        ("extract", ("in", "base", "out")),
        ("merge", ("in", "adapter", "out")),
        ("plan", ("in",)),
        ("publish", ("in", "org/name")),
        ("pull", ("org/name", "out")),
        ("quantize", ("in", "out")),
        ("resize", ("in", "out")),
        ("run", ("recipe.yaml",)),
        ("stack", (["in", "in"], "out")),
        ("train", ()),
        ("verify", ("in",)),
    ],
)
def test_options_of_another_class_are_refused_by_name_before_anything_is_read(name, arguments, tmp_path, monkeypatch):
    """An empty dict used to count as no options, and others raised an AttributeError, some after work was done."""
    monkeypatch.chdir(tmp_path)
    function = getattr(adaptkit, name)
    key, kind = ("config", "TrainConfig") if name == "train" else ("options", _options_of(name))
    for given in ({}, {"rank": 2}, "text", adaptkit.DequantizeOptions if name == "dequantize" else 1):
        with pytest.raises(UsageError, match=rf"^{key}: expected {kind}, found {type(given).__name__}\n") as caught:
            function(given, "out") if name == "train" else function(*arguments, given)
        assert caught.value.hint == f"pass adaptkit.{kind}(...)"
    assert list(tmp_path.iterdir()) == []


def _options_of(name):
    return {"compare": "EvaluateOptions"}.get(name, f"{name.capitalize()}Options")


def test_every_function_that_takes_options_is_in_the_test_above():
    cases = test_options_of_another_class_are_refused_by_name_before_anything_is_read.pytestmark[0].args[1]
    functions = {name: found for name in adaptkit._PUBLIC if inspect.isfunction(found := getattr(adaptkit, name))}
    parameters = {name: set(inspect.signature(found).parameters) for name, found in functions.items()}
    takes = [name for name, found in parameters.items() if found & {"options", "config"}]
    assert sorted(takes) == [name for name, _ in cases]


def test_numpys_numbers_give_the_same_bytes_as_pythons(llama, adapter, second_adapter, tmp_path):
    """They used to fail with "not JSON serializable"."""
    for name, whole, flag in ("python", int, bool), ("numpy", np.int64, np.bool_):
        out, both = tmp_path / name, [adapter, second_adapter]
        half = np.float32(0.3) if name == "numpy" else float(np.float32(0.3))
        weights = np.array([1, half]) if name == "numpy" else (1, half)
        adaptkit.merge(llama, both, out / "merged", adaptkit.MergeOptions(weights, untie=flag(False)))
        adaptkit.resize(adapter, out / "resized", adaptkit.ResizeOptions(rank=whole(2), threads=whole(1)))
        settings = {"density": half, "seed": whole(3)}
        adaptkit.stack(both, out / "stacked", adaptkit.StackOptions("dare", weights, whole(2), settings=settings))
        found = adaptkit.ExtractOptions(rank=whole(2), seed=whole(1), only_linear=flag(True))
        adaptkit.extract(out / "merged", llama, out / "found", found)
        quantized = adaptkit.QuantizeOptions(block_size=whole(32), max_shard_bytes=1e5 if name == "numpy" else 100000)
        adaptkit.quantize(llama, out / "nf4", quantized)
    manifests = sorted((tmp_path / "python").glob("*/adaptkit-manifest.json"))
    assert len(manifests) == 5
    for path in manifests:
        assert (tmp_path / "numpy" / path.parent.name / path.name).read_bytes() == path.read_bytes(), path.parent.name


class _Path:
    """A path of a different library, of which ``str`` does not give the path."""

    def __fspath__(self):
        return "rows.jsonl"


def test_a_configuration_accepts_any_path_like_object():
    assert adaptkit.TrainConfig(base=_Path(), data=_Path()) == adaptkit.TrainConfig("rows.jsonl", ("rows.jsonl",))


def test_integers_give_the_same_bytes_as_equal_floats(llama, adapter, second_adapter, tmp_path):
    """1 and 1.0 are equal, but not the same text in a manifest."""
    merged = tmp_path / "merged"
    adaptkit.merge(llama, adapter, merged)
    for name, one in ("whole", 1), ("real", 1.0):
        out = tmp_path / name
        adaptkit.merge(llama, adapter, out / "merged", adaptkit.MergeOptions(weights=(one,)))
        adaptkit.resize(adapter, out / "resized", adaptkit.ResizeOptions(energy=one))
        adaptkit.stack(
            [adapter, second_adapter], out / "stacked", adaptkit.StackOptions(energy=one, weights=(one, one))
        )
        adaptkit.extract(merged, llama, out / "found", adaptkit.ExtractOptions(energy=one, max_rank=4))
    for path in (tmp_path / "real").glob("*/adaptkit-manifest.json"):
        assert (tmp_path / "whole" / path.parent.name / path.name).read_bytes() == path.read_bytes(), path.parent.name
    recorded = {
        json.dumps(adaptkit.Calibration(files=(adapter / "adapter_config.json",), bits_budget=bits).recorded())
        for bits in (5, 5.0)
    }
    assert len(recorded) == 1


def test_computing_with_a_model_is_refused_while_another_thread_does_so(llama, tmp_path):
    """All threads share their random numbers; the thread that computes may make such calls itself."""
    rows = tiny.write_instructions(tmp_path / "rows.jsonl", rows=8)
    config = adaptkit.TrainConfig(base=str(llama), data=[rows], steps=2, rank=2, dropout=0.5)
    refused = []

    def others(report):
        adaptkit.evaluate(llama, data=rows)
        calls = (
            lambda: adaptkit.train(config, tmp_path / "second"),
            lambda: adaptkit.evaluate(llama, data=rows),
            lambda: adaptkit.compare(llama, data=rows),
            lambda: adaptkit.plan(llama),
            lambda: adaptkit.quantize(
                llama, tmp_path / "nf4", adaptkit.QuantizeOptions(calibration=adaptkit.Calibration(rows, 64, 16))
            ),
        )
        with ThreadPoolExecutor() as pool:
            refused.extend(type(error) for error in pool.map(_error_of, calls))

    adaptkit.train(config, tmp_path / "first", on_step=others, note=lambda text: None)
    assert refused == [adaptkit.errors.ConflictError] * 10
    assert not (tmp_path / "second").exists()
    adaptkit.train(config, tmp_path / "again", note=lambda text: None)
    one, two = (Path(tmp_path, name, "adapter_model.safetensors").read_bytes() for name in ("first", "again"))
    assert one == two


def _error_of(call):
    try:
        call()
    except adaptkit.AdaptkitError as error:
        return error


@pytest.mark.parametrize(
    ("call", "missing"),
    [
        (lambda base, adapter, out: adaptkit.inspect("no/such"), "no/such"),
        (lambda base, adapter, out: adaptkit.verify("no/such"), "no/such"),
        (lambda base, adapter, out: adaptkit.merge("no/such", adapter, out), "no/such"),
        (lambda base, adapter, out: adaptkit.merge(base, [adapter, "nor/this"], out), "nor/this"),
        (lambda base, adapter, out: adaptkit.quantize("no/such", out), "no/such"),
        (lambda base, adapter, out: adaptkit.publish("no/such", "org/name"), "no/such"),
    ],
    ids=["inspect", "verify", "base of merge", "adapter of merge", "quantize", "publish"],
)
def test_a_missing_path_is_named_in_the_error(llama, adapter, tmp_path, call, missing):
    with pytest.raises(UsageError, match=f"^{missing}: does not exist"):
        call(llama, adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_source_may_be_a_string_or_a_path(llama, tmp_path):
    assert adaptkit.resolve_source(str(llama)) == adaptkit.resolve_source(llama) == llama
    with pytest.raises(adaptkit.errors.UsageError, match="does not exist"):
        adaptkit.resolve_source(tmp_path / "absent")


def test_a_single_string_is_accepted_where_several_are(llama):
    """It used to be taken for its letters: a model got two prompts instead of "hi"."""
    assert adaptkit.EvaluateOptions(prompts="hi").prompts == ("hi",)
    assert adaptkit.PlanOptions(targets="q_proj").targets == ("q_proj",)
    assert adaptkit.QuantizeOptions(skip="*.0.*").skip == ("*.0.*",)
    assert adaptkit.ExtractOptions(rank=1, target="*.0.*").target == ("*.0.*",)
    assert adaptkit.PullOptions(only="tokenizer").only == ("tokenizer",)
    config = adaptkit.TrainConfig(base=llama, data=Path("rows.jsonl"), targets="q_proj", sample_prompts="hi")
    assert config == adaptkit.TrainConfig(str(llama), ("rows.jsonl",), targets=["q_proj"], sample_prompts=["hi"])
    assert [verdict.target for verdict in adaptkit.check(llama, "peft").verdicts] == ["peft"]


def test_signer_and_trust_are_exported():
    assert adaptkit.Signer(private_key="key.pem").private_key == Path("key.pem")
    assert adaptkit.Trust(public_key="key.pub").public_key == Path("key.pub")


def test_the_examples_of_the_documentation_run(llama, tmp_path, monkeypatch, capsys):
    shutil.copytree(llama, tmp_path / "SmolLM2-135M-Instruct")
    for name in "rows.jsonl", "test.jsonl":
        tiny.write_instructions(tmp_path / name, rows=24)
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec("".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})
    assert capsys.readouterr().out.endswith("choose another -o, or replace it with --force\n")
    assert (tmp_path / "merged" / "adaptkit-manifest.json").exists()


def test_editors_and_type_checkers_find_every_public_name_where_it_is():
    """They read ``__init__.pyi``, since ``__init__.py`` imports nothing but the errors."""
    stub = ast.parse(Path(adaptkit.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom) and node.module != "adaptkit"]
    assert [(node.module, alias.asname) for node in imports for alias in node.names] == sorted(
        ((module, name) for name, module in adaptkit._PUBLIC.items())
    )


def test_the_repr_of_a_report_does_not_grow_with_the_model(adapter, llama, tmp_path):
    """A notebook prints it; for a model of 30 layers, that of ``diff`` had 400,000 characters."""
    adaptkit.merge(llama, adapter, tmp_path / "merged")
    reports = [
        adaptkit.quantize(llama, tmp_path / "nf4"),
        adaptkit.merge(llama, adapter, tmp_path / "again"),
        adaptkit.diff(adapter, adapter),
        adaptkit.diff(llama, tmp_path / "merged"),
        adaptkit.extract(tmp_path / "merged", llama, tmp_path / "extracted", adaptkit.ExtractOptions(rank=2)),
        adaptkit.resize(adapter, tmp_path / "resized", adaptkit.ResizeOptions(rank=2)),
        adaptkit.stack([adapter, adapter], tmp_path / "stacked"),
    ]
    for report in reports:
        assert ".layers.1." in json.dumps(dataclasses.asdict(report)), "has an entry for each"
        assert "layers.1" not in repr(report)


def test_the_errors_need_no_import_of_their_own():
    """``except adaptkit.errors.UsageError`` used to work only once something else had loaded them."""
    code = "import adaptkit; assert 'errors' in dir(adaptkit); print(adaptkit.errors.UsageError.exit_code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"


def test_a_traceback_shows_the_hint_of_an_error(tmp_path):
    error = UsageError("a problem", hint="one thing to try")
    assert traceback.format_exception_only(error)[1:] == ["hint: one thing to try\n"]
    error.advise("another")
    assert traceback.format_exception_only(error)[1:] == ["hint: another\n"]
    assert len(traceback.format_exception_only(UsageError("a problem"))) == 1


def test_the_documentation_of_the_configuration_describes_every_setting():
    text = inspect.getdoc(adaptkit.TrainConfig)
    for field in dataclasses.fields(adaptkit.TrainConfig):
        help = field.metadata["setting"].help
        assert f"\n    {field.name}: {help}" in re.sub(r"\n        +", " ", text), field.name


@pytest.mark.parametrize("call", [adaptkit.inspect, adaptkit.plan, lambda name: adaptkit.merge(name, name, "out")])
def test_the_name_of_a_repository_gets_a_hint(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="org/name@v1: does not exist") as caught:
        call("org/name@v1")
    assert 'adaptkit.resolve_source("org/name@v1")' in caught.value.hint
    with pytest.raises(UsageError) as caught:
        call(str(tmp_path / "org" / "name"))
    assert "resolve_source" not in caught.value.hint


FUNCTIONS = [name for name in adaptkit.__all__ if inspect.isfunction(getattr(adaptkit, name))]
OPTIONS = [name for name in adaptkit.__all__ if dataclasses.is_dataclass(getattr(adaptkit, name))]


def _flags(name):
    parameters = inspect.signature(getattr(adaptkit, name)).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return required, [p.name for p in parameters if str(p.annotation) in ("bool", "<class 'bool'>")]


@pytest.mark.parametrize("given", ["no", "", None, 2, [True]])
def test_a_flag_that_is_neither_true_nor_false_is_refused_by_name_before_anything_is_read(given, tmp_path, monkeypatch):
    """The text "no" counts as true in Python."""
    monkeypatch.chdir(tmp_path)
    tried = set()
    for name in [*FUNCTIONS, *OPTIONS]:
        required, flags = _flags(name)
        for flag in flags:
            with pytest.raises(UsageError, match=rf"^{flag}: (must be|is .*; expected) true or false"):
                getattr(adaptkit, name)(**dict.fromkeys(required, "x"), **{flag: given})
            tried.add(flag)
    assert {"force", "dry_run", "resume", "recompute", "undo", "pack"} <= tried
    assert not any(tmp_path.iterdir())
