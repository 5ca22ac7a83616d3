"""Every stacking method, from adapters that peft writes to one that peft loads."""

import json
import math
import re

import numpy as np
import pytest
import tiny
import torch
from folders import edit_json, tree
from peft_adapters import change_tensors
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.discovery import load, names
from adaptkit.errors import AdapterError, NonFiniteError, UsageError
from adaptkit.numerics import stacking
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spectrum import Spectrum
from adaptkit.operations.stack import StackOptions, stack

METHODS = names(stacking)
SUMS = ["cat", "linear", "svd"]
WEIGHTS = (1.0, -0.5, 2.0)
PREFIX = "base_model.model."
EMBEDDING_ADVICE = pytest.mark.filterwarnings(
    "ignore:Setting .save_embedding_layers", "ignore:Model has .tie_word_embeddings"
)
"""Ignores peft's warnings about adapters for embeddings."""


def dense(folder):
    """Map each module to its change in float64, computed from the files as PEFT's documentation defines it."""
    tensors, config = load_file(folder / "adapter_model.safetensors"), read_adapter(folder).config
    found = {}
    for key in tensors:
        if "lora_A" in key or "lora_embedding_A" in key:
            module = key.removeprefix(PREFIX).split(".lora_")[0]
            a, b = tensors[key].double(), tensors[key.replace("_A", "_B")].double()
            rank = a.shape[0]
            alpha = next((v for k, v in config["alpha_pattern"].items() if matches(k, module)), config["lora_alpha"])
            scale = alpha / rank**0.5 if config["use_rslora"] else alpha / rank
            found[module] = (scale * (b @ a)).T if "embedding" in key else scale * (b @ a)
    return found


def as_matrix(made):
    """Convert a method's result, which may be a spectrum, a matrix or factors, to a matrix."""
    if isinstance(made, Spectrum):
        return made.u * made.sigma @ made.vt
    return made if isinstance(made, torch.Tensor) else made.lora_b.double() @ made.lora_a.double()


def matches(pattern, module):
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def through_peft(base, folder):
    """Map each module to what peft adds to its weight, computed in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return deltas(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder))


def deltas(model):
    """Do the same for a model that peft has loaded adapters into."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(PREFIX): layer.get_delta_weight("default").detach().double()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.fixture(scope="module")
def parts(tmp_path_factory, llama, adapter):
    """Adapters with patterns, with rsLoRA, and with fewer modules."""
    folder = tmp_path_factory.mktemp("parts")
    patterned = tiny.write_peft_adapter(
        folder / "patterned",
        llama,
        rank=3,
        seed=5,
        rank_pattern={"q_proj": 6, "layers.1.mlp.up_proj": 2},
        alpha_pattern={"v_proj": 1},
    )
    rslora = tiny.write_peft_adapter(
        folder / "rslora", llama, rank=2, seed=6, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    return [adapter, patterned, rslora]


@pytest.fixture(scope="module")
def expected(parts):
    """A function that applies a method to the weighted dense changes of each module, each as factors I · Δ."""
    changes = [dense(folder) for folder in parts]

    def whole(method, **settings):
        chosen, result = load(stacking, method, "METHOD"), {}
        for module in changes[0]:
            shape = changes[0][module].shape
            matrices = [
                weight * change.get(module, torch.zeros(shape)) for weight, change in zip(WEIGHTS, changes, strict=True)
            ]
            terms = [LowRank.of_tensors(matrix, torch.eye(shape[0]).double(), 1.0) for matrix in matrices]
            result[module] = as_matrix(chosen.combine(terms, chosen.options(**settings), module))
        return result

    return whole


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_equals_the_method_applied_to_dense_changes(tmp_path, parts, expected, method):
    """At full rank. The expected changes have different factors, but only the matrices matter."""
    limit = {} if method == "cat" else {"energy": 1.0}
    report = stack(parts, tmp_path / "out", StackOptions(method, WEIGHTS, **limit))
    found, wanted = dense(tmp_path / "out"), expected(method)
    assert set(found) == set(wanted)
    assert report.energy_kept == pytest.approx(1.0, abs=1e-12)
    assert (report.modules, report.partial, report.zero, report.adapters) == (14, 8, 0, 3)
    for entry in report.per_module:
        matrix = wanted[entry.module]
        assert entry.norm == pytest.approx(float(matrix.norm()), rel=1e-6)
        assert (found[entry.module] - matrix).norm() <= 2e-6 * matrix.norm(), entry.module
        assert entry.adapters == (3 if entry.module.endswith(("q_proj", "v_proj", "down_proj")) else 2)


@pytest.mark.parametrize("method", METHODS)
def test_the_energy_left_by_truncation_is_reported_by_module_and_in_total(tmp_path, parts, expected, method):
    """With the same bytes from any number of threads."""
    report = stack(parts, tmp_path / "out", StackOptions(method, WEIGHTS, rank=2, threads=2))
    stack(parts, tmp_path / "one", StackOptions(method, WEIGHTS, rank=2, threads=1))
    assert tree(tmp_path / "out") == tree(tmp_path / "one")
    found, wanted = dense(tmp_path / "out"), expected(method)
    strongest = expected("linear")  # iso, whose singular values are all equal, truncates by these
    assert report.ranks == (2, 2)
    kept = whole = 0.0
    for entry in report.per_module:
        matrix = wanted[entry.module].numpy()
        u, sigma, vt = np.linalg.svd(strongest[entry.module].numpy() if method == "iso" else matrix)
        sigma = np.linalg.svd(matrix, compute_uv=False)
        best = u[:, :2] @ np.diag(sigma[:2]) @ vt[:2]
        assert np.abs(found[entry.module].numpy() - best).max() < 1e-5 * np.abs(matrix).max()
        assert entry.energy_kept == pytest.approx((best**2).sum() / (matrix**2).sum(), rel=1e-5)
        kept, whole = kept + (best**2).sum(), whole + (matrix**2).sum()
    assert report.energy_kept == pytest.approx(kept / whole, rel=1e-5)
    assert report.energy_kept < 0.999


def test_sums_equal_the_sum_of_what_peft_computes_for_each_part(tmp_path, llama, parts, copy_of):
    """peft computes both sides, including rsLoRA, patterns and factors in bfloat16."""
    given = [*parts[:2], copy_of(parts[2])]
    change_tensors(given[2], lambda t: t.update({key: tensor.bfloat16() for key, tensor in t.items()}))
    each = [through_peft(llama, folder) for folder in given]
    for method in SUMS:
        stack(given, tmp_path / method, StackOptions(method, WEIGHTS, **({"rank": 64} if method == "svd" else {})))
        for module, matrix in through_peft(llama, tmp_path / method).items():
            wanted = sum(weight * part[module] for weight, part in zip(WEIGHTS, each, strict=True) if module in part)
            assert (matrix - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize(("method", "ranks"), [("cat", (6, 12)), ("svd", (6, 6)), ("ties", (6, 12))])
def test_the_configuration_suits_readers_that_know_only_one_scaling(tmp_path, llama, parts, method, ranks):
    """vLLM scales every module by the configuration's lora_alpha / r, and takes ranks from the tensors."""
    report = stack(parts, tmp_path / "out", StackOptions(method, WEIGHTS))
    assert report.ranks == ranks  # if no limit is given
    assert (report.energy_kept == pytest.approx(1.0, abs=1e-12)) is (method == "cat")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert config["use_rslora"] is config["use_dora"] is False
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert config["lora_alpha"] == config["r"]
    of = {entry.module: entry.rank for entry in report.per_module}
    others = {module for module, rank in of.items() if rank != config["r"]}
    assert bool(others) is (method != "svd")  # which by default gives all modules the same rank
    assert config["rank_pattern"] == {f"^{re.escape(module)}$": of[module] for module in others}
    assert config["alpha_pattern"] == config["rank_pattern"]  # so lora_alpha / r is the scaling of every module: 1
    assert {term.scaling for term in read_adapter(tmp_path / "out").modules.values()} == {1.0}
    assert {key.rpartition(".lora_")[2] for key in tensors} == {"A.weight", "B.weight"}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    in_peft = through_peft(llama, tmp_path / "out")
    for module, matrix in dense(tmp_path / "out").items():
        assert tensors[f"{PREFIX}{module}.lora_A.weight"].shape[0] == of[module]
        assert (in_peft[module] - matrix).norm() <= 1e-6 * matrix.norm()
    stack(parts, tmp_path / "even", StackOptions(method, WEIGHTS, rank=2))
    even = json.loads((tmp_path / "even" / "adapter_config.json").read_text())
    assert (even["r"], even["rank_pattern"], even["alpha_pattern"]) == (2, {}, {})


def test_svd_by_default_has_the_rank_and_the_result_of_peft(tmp_path, llama):
    """Regression: modules with smaller ranks were truncated to less than the largest rank of any module."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    parts = [
        tiny.write_peft_adapter(tmp_path / str(seed), llama, rank=2, seed=seed, rank_pattern={"up_proj": rank})
        for seed, rank in ((7, 5), (8, 3))
    ]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), parts[0], "0")
    model.load_adapter(parts[1], "1")
    model.add_weighted_adapter(["0", "1"], [1.0, -0.5], "default", "svd")
    report = stack(parts, tmp_path / "out", StackOptions("svd", (1.0, -0.5)))
    assert report.ranks == (4, 5)  # the sum of 2 and 2, and of 5 and 3 the largest
    found = dense(tmp_path / "out")
    for module, change in deltas(model).items():
        assert torch.allclose(found[module], change, atol=1e-6)


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della"])
def test_a_modules_random_numbers_do_not_depend_on_other_modules(tmp_path, parts, copy_of, method):
    fewer = [copy_of(folder) for folder in parts]
    for folder in fewer:
        change_tensors(folder, lambda t: [t.pop(key) for key in list(t) if "down_proj" not in key])
    stack(parts, tmp_path / "all", StackOptions(method))
    stack(fewer, tmp_path / "fewer", StackOptions(method))
    some = load_file(tmp_path / "fewer" / "adapter_model.safetensors")
    everything = load_file(tmp_path / "all" / "adapter_model.safetensors")
    assert len(some) == 4
    assert all(torch.equal(tensor, everything[key]) for key, tensor in some.items())


def test_different_seeds_give_different_results_and_are_recorded(tmp_path, parts):
    roots = {
        stack(parts, tmp_path / str(seed), StackOptions("dare", settings={"seed": seed})).tensors_root
        for seed in (0, 1, 2)
    }
    assert len(roots) == 3
    assert require_manifest(tmp_path / "2").operation["options"]["seed"] == 2


def test_integers_and_equal_floats_give_the_same_result(tmp_path, parts):
    """Numbers from a recipe are floats."""
    settings = ({"seed": 3, "density": 1}, {"seed": 3.0, "density": 1.0})
    written = [stack(parts, tmp_path / str(n), StackOptions("dare", settings=each)) for n, each in enumerate(settings)]
    assert written[0].manifest_sha256 == written[1].manifest_sha256
    for seed, problem in ((1.5, "is 1.5; expected a whole"), (2.0**63, "must be at least 0 and"), (math.nan, "is nan")):
        with pytest.raises(UsageError, match=rf"seed: {problem}"):
            StackOptions("dare", settings={"seed": seed})


@EMBEDDING_ADVICE
@pytest.mark.parametrize("method", ["cat", "ties", "knots"])
def test_embeddings_stay_embeddings(tmp_path, method):
    base = tiny.write_llama(tmp_path / "base", tied=False)
    targets = ["embed_tokens", "q_proj"]
    parts = [
        tiny.write_peft_adapter(tmp_path / str(seed), base, seed=seed, rank=seed, target_modules=targets)
        for seed in (2, 3)
    ]
    report = stack(parts, tmp_path / "out", StackOptions(method, energy=None if method == "cat" else 1.0))
    assert report.base_copies == ("model.embed_tokens.weight",)
    assert read_adapter(tmp_path / "out").base_copies.keys() == read_adapter(parts[0]).base_copies.keys()
    assert read_adapter(tmp_path / "out").embeddings == frozenset({"model.embed_tokens"})
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert f"{PREFIX}model.embed_tokens.lora_embedding_A" in keys
    found = through_peft(base, tmp_path / "out")
    if method == "cat":
        each = [through_peft(base, folder) for folder in parts]
        for module, matrix in found.items():
            wanted = each[0][module] + each[1][module]
            assert (matrix - wanted).norm() <= 1e-6 * wanted.norm()
    else:
        changes = [dense(folder)["model.embed_tokens"] for folder in parts]
        chosen = load(stacking, method, "METHOD")
        terms = [LowRank.of_tensors(change, torch.eye(change.shape[0]).double(), 1.0) for change in changes]
        wanted = as_matrix(chosen.combine(terms, chosen.options(), "model.embed_tokens"))
        assert (found["model.embed_tokens"] - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_module_without_any_change_stays_zero_and_is_counted(tmp_path, parts, copy_of):
    idle = [copy_of(folder) for folder in parts[:2]]
    key = f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"
    for folder in idle:
        change_tensors(folder, lambda t: t[key].zero_())
    for method in METHODS:
        report = stack(idle, tmp_path / method, StackOptions(method))
        assert report.zero == 1
        assert not dense(tmp_path / method)["model.layers.0.mlp.up_proj"].any()
        assert next(e for e in report.per_module if not e.norm).module == "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_which_nothing_is_left_or_too_much_are_refused(tmp_path, parts, method):
    with pytest.raises(UsageError, match="nothing is left of any module") as caught:
        stack(parts, tmp_path / "out", StackOptions(method, (0.0, 0.0, 0.0)))
    assert caught.value.hint
    with pytest.raises(NonFiniteError, match=r"model\.layers.*too large for float32") as caught:
        stack(parts, tmp_path / "out", StackOptions(method, (1e300, 1.0, 1.0)))
    assert caught.value.hint
    if method in ("linear", "svd", "iso", "magnitude_prune", "breadcrumbs"):
        # The other methods do not subtract opposite changes, but concatenate them or choose among them.
        with pytest.raises(UsageError, match="nothing is left"):
            stack([parts[0]] * 2, tmp_path / "out", StackOptions(method, (1.0, -1.0)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "settings", "message", "hint"),
    [
        ("cat", {"density": 0.5}, "cat does not use --density", "it uses no option"),
        ("ties", {"seed": 1}, "ties does not use --seed", "it uses --density, --lambda"),
        ("della", {"gamma": 0.1}, "della does not use --gamma", "it uses --density, --epsilon, --lambda, --seed"),
        ("ties", {"density": 7.0}, "density: .*found 7.0", "is kept"),
    ],
)
def test_unused_or_invalid_options_of_a_method_are_refused_with_a_fitting_hint(method, settings, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        StackOptions(method, settings=settings)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("DoRA", {"use_dora": True}),
        ("bias", {"bias": "lora_only", "target_modules": ["q_proj", "c_attn"]}),
        ("replaces", {"modules_to_save": ["lm_head"]}),
        ("rows", {"trainable_token_indices": [3, 4]}),
    ],
)
def test_changes_that_are_not_low_rank_are_refused_and_named(tmp_path, adapter, kind, lora):
    base = tiny.write_family(tmp_path / "base", "qwen2")
    special = tiny.write_peft_adapter(tmp_path / "special", base, **lora)
    with pytest.raises(AdapterError, match=f"cannot stack .*{kind}") as caught:
        stack([adapter, special], tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


@EMBEDDING_ADVICE
def test_embeddings_that_do_not_fit_together_are_refused(tmp_path, copy_of):
    base = tiny.write_llama(tmp_path / "base", tied=False)
    one, linear = (tiny.write_peft_adapter(tmp_path / n, base, target_modules=["embed_tokens"]) for n in ("a", "b"))
    tied, other = copy_of(one, "tied"), copy_of(one, "other")
    edit_json(tied / "adapter_config.json", ensure_weight_tying=True)
    change_tensors(other, lambda t: t[f"{PREFIX}model.embed_tokens.base_layer.weight"][3, 3].add_(1))

    def turn(tensors):
        a = tensors.pop(f"{PREFIX}model.embed_tokens.lora_embedding_A")
        b = tensors.pop(f"{PREFIX}model.embed_tokens.lora_embedding_B")
        tensors[f"{PREFIX}model.embed_tokens.lora_A.weight"] = b.T.contiguous()
        tensors[f"{PREFIX}model.embed_tokens.lora_B.weight"] = a.T.contiguous()

    change_tensors(linear, turn)
    for second, error in (
        (linear, "embedding in one adapter, but a linear layer in"),
        (tied, "ensure_weight_tying"),
        (other, r"different copies of the base's model\.embed_tokens\.weight"),
    ):
        with pytest.raises(AdapterError, match=error):
            stack([one, second], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_different_tokenizers_are_refused(tmp_path, parts, copy_of):
    ours, theirs = copy_of(parts[0]), copy_of(parts[1])
    (ours / "chat_template.jinja").write_text("{{ messages }}")
    report = stack([ours, theirs], tmp_path / "one")
    assert report.tokenizer == ("chat_template.jinja",)
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == "{{ messages }}"
    (theirs / "chat_template.jinja").write_text("{{ messages[0] }}")
    with pytest.raises(UsageError, match=r"contain different versions of chat_template\.jinja"):
        stack([ours, theirs], tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_a_stack_of_adapters_that_name_different_bases_names_none_and_reports_it(tmp_path, parts, copy_of, run_cli):
    other = copy_of(parts[1])
    edit_json(other / "adapter_config.json", base_model_name_or_path="org/other")
    done = run_cli("stack", parts[0], other, "-o", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert "'org/other'; the result names none" in done.stdout
    assert read_adapter(tmp_path / "out").config["base_model_name_or_path"] == ""
    assert "names none" not in run_cli("stack", *parts, "-o", tmp_path / "agreed").stdout


def write_one_layer(folder, rows, seed):
    """Write an adapter of one linear layer without an architecture."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    factors = {f"{PREFIX}model.layers.0.mlp.up_proj.lora_{half}.weight": torch.randn(shape, generator=generator)
               for half, shape in (("A", (4, 3072)), ("B", (rows, 4)))}  # fmt: skip
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("method", ["ties", "della", "sce"])
def test_elementwise_methods_hold_one_matrix_of_a_module(run_cli, tmp_path, method):
    peaks = []
    for rows in (256, 3072):
        adapters = [write_one_layer(tmp_path / f"{rows}-{seed}", rows, seed) for seed in range(2)]
        done = run_cli(
            *("stack", *adapters, "-o", tmp_path / str(rows), "--method", method),
            *("--density", 0.5, "--rank", 8, "--threads", 1),
        )
        assert done.code == 0, done.stderr
        peaks.append(done.peak_bytes)
    added = (3072 - 256) * 3072 * 8  # of one matrix in float64
    assert peaks[1] - peaks[0] < 1.6 * added
