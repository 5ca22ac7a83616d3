"""Adapters of every kind that peft writes are merged to what the running model computes, rounded once, or refused."""

import contextlib
import json
import logging
import mmap
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import peft_adapters
import peft_formulas
import pytest
import tiny
import torch
from folders import edited_tensors, tree
from peft_adapters import CASES, OF_EVERY_KIND, PREFIX, WEIGHTS
from peft_formulas import HEAD, rounded_once, tensors_of
from safetensors.torch import load_file, save_file

from adaptkit.errors import AdapterError, AdaptkitError, BaseMismatchError, IntegrityError
from adaptkit.operations._merge import folding
from adaptkit.operations._merge.undo_record import UndoRecord
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.unmerge import unmerge
from adaptkit.operations.verify import verify

INDEX, MANIFEST = "model.safetensors.index.json", "adaptkit-manifest.json"
UNTIED = [name for name, case in CASES.items() if case.untied]


def options_for(case: peft_adapters.Case, **options) -> MergeOptions:
    return MergeOptions(untie=True, **options) if case.untied else MergeOptions(**options)


def steps_apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Distance between two tensors of equal signs, counted in representable numbers of their dtype."""
    integers = torch.int32 if one.dtype == torch.float32 else torch.int16
    return (one.view(integers).long() - other.view(integers).long()).abs()


def assert_rounded_once(found, exact, files, by_norm=frozenset()):
    """Check that every element is the float64 result rounded to the base's dtype.

    A norm's last bits in float64 depend on the order of its sum, which may change how very few elements are rounded.
    """
    assert set(found) == set(exact)
    for name, values in exact.items():
        dtype = files[name if name in files else embedding_in(files)].dtype
        assert found[name].dtype == dtype, name
        assert found[name].shape == values.shape, name
        wanted = rounded_once(values, dtype)
        if name in by_norm:
            apart = steps_apart(found[name] + 0.0, wanted + 0.0)  # -0 becomes 0; it occurs if a row's magnitude is 0
            assert apart.max() <= 1, name
            assert int(apart.sum()) <= 2, name
        else:
            assert torch.equal(found[name], wanted), name


def embedding_in(files):
    return next(name for name in peft_formulas.EMBEDDINGS if name in files)


def by_norm(*judgements):
    return {name for judgement in judgements for name, change in judgement.changes.items() if change.by_norm}


def shards_of(folder):
    return {path.name: sorted(load_file(path)) for path in sorted(folder.glob("model*.safetensors"))}


def assert_kept_but_for_weights(out, base, case: peft_adapters.Case):
    """Check that files, shards, tokenizer and configuration are the base's, except for the required changes."""
    before, after = ({path.name for path in folder.iterdir()} for folder in (base, out))
    assert {name for name in after - before if not name.startswith("adaptkit-")} == set()
    assert before <= after
    names = {name for name in before if not name.endswith((".safetensors", ".index.json")) and name != "config.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    for name in names:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    changes = {"tie_word_embeddings": False} if case.untied else {}
    changes |= {"vocab_size": case.vocabulary} if case.vocabulary else {}
    config, found = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    assert found == config | changes
    if not changes:
        assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    shards, held = shards_of(base), shards_of(out)
    assert set(shards) == set(held)
    added = {name for names in held.values() for name in names} - {name for names in shards.values() for name in names}
    assert added == ({HEAD} if case.untied else set())
    assert all(set(names) - added == set(shards[file]) for file, names in held.items())
    assert (INDEX in after) == (INDEX in before)
    if INDEX in after:
        index = json.loads((out / INDEX).read_text())
        assert index["weight_map"] == {name: file for file, names in held.items() for name in names}
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(out).values())
        assert index["metadata"]["total_size"] == total


def files_of(folder):
    """Map the relative path of every file, except adaptkit's own, to its content."""
    return {name: content for name, content in tree(folder).items() if not name.startswith("adaptkit-")}


def assert_undone(merged, adapters, base):
    """Check that unmerge restores every file of the base, and adds only a manifest."""
    back = merged.with_name(f"{merged.name}-undone")
    assert files_of(merged) != files_of(base)
    assert unmerge(merged, adapters, back).identical
    ours, theirs = files_of(back), files_of(base)
    assert set(ours) == set(theirs)
    assert [name for name, content in theirs.items() if ours[name] != content] == []
    assert [path.name for path in back.glob("adaptkit-*")] == [MANIFEST]
    verify(back)


def assert_right(out, case, judgement):
    """Check tensors, files and configuration of a merge."""
    found, exact = tensors_of(out), peft_formulas.merged(judgement.files, [judgement.changes])
    assert_rounded_once(found, exact, judgement.files, by_norm(judgement))
    untouched = set(judgement.files) - set(judgement.changes)
    assert all(torch.equal(found[name], judgement.files[name]) for name in untouched)
    assert_kept_but_for_weights(out, case.base, case.case)


class Said(logging.Handler):
    """Collects warnings that transformers logs while it loads."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def loaded(folder):
    """Load a checkpoint with transformers; check that it warns of no missing, unexpected or tied weights."""
    from transformers import AutoModelForCausalLM

    said, logger = Said(), logging.getLogger("transformers")
    logger.addHandler(said)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    finally:
        logger.removeHandler(said)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert said.lines == []
    return model.eval()


def assert_computes(out, case, judgement, tolerance, measure=torch.max):
    """Check that transformers loads a merge, tied as it should be, and computes the logits of the running adapter.

    Those of peft's own merge may differ, since it changes a tied head along with its embedding.
    """
    model = loaded(out)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == ((case.case.tied or case.case.family == "gpt2") and not case.case.untied)
    if judgement.logits is None:
        return
    with torch.no_grad():
        logits = model(peft_formulas.tokens(case.case.vocabulary)).logits
    assert logits.shape == judgement.logits.shape
    assert measure((logits - judgement.logits).abs()) < tolerance * measure(judgement.logits.abs())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "bfloat16") for name in CASES),
        *((name, "float32") for name in OF_EVERY_KIND),
        *((name, "float16") for name in ("experts_mixtral", "tokens_resized_tied", "everything_phi", "dora")),
    ],
)
def test_every_element_is_the_float64_result_rounded_once_and_every_byte_of_the_base_comes_back(
    tmp_path, judged, name, dtype
):
    case, judgement = judged(name, dtype)
    report = merge(case.base, [case.adapter], tmp_path / "out", options_for(case.case))
    assert not any("does not select" in told for told in report.notes)
    assert_right(tmp_path / "out", case, judgement)
    if dtype == "bfloat16":  # whose rounding routes a few tokens to different experts
        assert_computes(tmp_path / "out", case, judgement, 0.05, torch.mean)
    elif dtype == "float32":
        assert_computes(tmp_path / "out", case, judgement, 5e-6)
    assert_undone(tmp_path / "out", [case.adapter], case.base)


@pytest.mark.parametrize("name", OF_EVERY_KIND)
def test_the_bytes_do_not_depend_on_threads_nor_on_where_runs_of_rows_end(tmp_path, monkeypatch, judged, name):
    """Matrices this small are a single run. In the second merge every row is one; of a vocabulary some are added."""
    case, pieces = judged(name)[0], folding.Fold.pieces
    merge(case.base, case.adapter, tmp_path / "one", options_for(case.case, threads=1))
    merge(case.base, case.adapter, tmp_path / "two", options_for(case.case, threads=2))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    monkeypatch.setattr(folding.Fold, "pieces", lambda fold, run_bytes=0: pieces(fold, 1))
    merge(case.base, [case.adapter], tmp_path / "rows", options_for(case.case))
    assert files_of(tmp_path / "rows") == files_of(tmp_path / "one")
    assert_undone(tmp_path / "rows", [case.adapter], case.base)


@pytest.mark.parametrize("name", ["linear", "saved_both_tied", "resized_embedding", "dora", "tokens_tied"])
def test_signed_zeros_and_extremes_of_changed_tensors_are_restored(tmp_path, judged, name):
    case, judgement = judged(name)
    base = shutil.copytree(case.base, tmp_path / "base")
    top = float(torch.finfo(torch.bfloat16).max) / 64
    for path in base.glob("model*.safetensors"):
        with edited_tensors(path) as tensors:
            for key in set(judgement.changes) & set(tensors):
                tensors[key].view(-1)[:6] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, top, -top]).bfloat16()
    merge(base, [case.adapter], tmp_path / "merged", options_for(case.case))
    assert_undone(tmp_path / "merged", [case.adapter], base)


PAIRS = [
    (("linear_patterns", "linear_rslora"), (0.7, 0.3)),  # different ranks, rsLoRA, and the same tensors
    (("linear_rslora", "dora"), (1.0, 1.0)),  # LoRA and DoRA on down_proj and k_proj
    (("dora", "dora_rslora"), (-1.3, 0.25)),
    (("saved_mlp", "linear_patterns"), (0.7, 0.3)),  # tensors replaced by one and changed by the other
    (("saved_norms", "tokens_tied"), (1.0, 1.0)),
    (("tokens_tied", "embedding_tied_ensured"), (-1.3, 0.25)),  # rows replaced by one and changed by the other
    (("head", "saved_head"), (0.7, 0.3)),
    (("embedding", "tokens"), (1.0, 1.0)),
    (("lora_bias", "biases_lora_only"), (-1.3, 0.25)),
    (("biases_all", "everything_phi"), (0.7, 0.3)),
    (("experts_mixtral", "experts_up_only"), (1.0, 1.0)),
    (("experts_one_by_one_qwen2", "experts_qwen2"), (-1.3, 0.25)),
    (("conv1d", "dora_conv1d"), (0.7, 0.3)),
    (("embedding_tied", "embedding_tied_ensured"), (1.0, 1.0)),
]


@pytest.mark.parametrize(("names", "weights"), PAIRS, ids=lambda value: "+".join(map(str, value)))
def test_two_adapters_add_the_changes_that_each_makes_to_the_base_alone(tmp_path, judged, names, weights):
    """W + Σ weight · (W merged with the adapter alone, minus W), rounded once."""
    base, adapters = judged(names[0])[0].base, [judged(name)[0].adapter for name in names]
    judgements = [peft_formulas.judge(base, a, name) for a, name in zip(adapters, names, strict=True)]
    exact = peft_formulas.merged(judgements[0].files, [judgement.changes for judgement in judgements], weights)
    untie = any(CASES[name].untied for name in names)
    merge(base, adapters, tmp_path / "out", MergeOptions(weights=weights, untie=untie))
    assert_rounded_once(tensors_of(tmp_path / "out"), exact, judgements[0].files, by_norm(*judgements))
    assert_undone(tmp_path / "out", adapters, base)


@pytest.mark.parametrize(
    "names", [("resized", "linear"), ("embedding_tied", "tokens_tied"), ("experts_mixtral", "router_saved")]
)
def test_merges_of_merges_are_unmerged_in_reverse_order_from_the_last_alone(tmp_path, judged, names):
    first, second = (judged(name)[0] for name in names)
    base = shutil.copytree(first.base, tmp_path / "base")
    merge(base, [first.adapter], tmp_path / "once", options_for(first.case))
    base.rename(tmp_path / "gone")
    merge(tmp_path / "once", [second.adapter], tmp_path / "twice", options_for(second.case))
    once = files_of(tmp_path / "once")
    shutil.rmtree(tmp_path / "once")
    with pytest.raises((BaseMismatchError, IntegrityError)):
        unmerge(tmp_path / "twice", [first.adapter], tmp_path / "wrong")
    assert not list(tmp_path.glob("wrong*"))
    unmerge(tmp_path / "twice", [second.adapter], tmp_path / "back")
    assert files_of(tmp_path / "back") == once
    assert_undone(tmp_path / "back", [first.adapter], tmp_path / "gone")


def test_every_tensor_keeps_its_own_dtype(tmp_path, made):
    """The base's norms and head are in float32, the rest in bfloat16."""
    case = peft_adapters.make(made, "everything_phi")
    base = tmp_path / "base"
    shutil.copytree(case.base, base)
    with edited_tensors(base / "model.safetensors") as wide:
        wide |= {name: t.float() for name, t in wide.items() if "norm" in name or "lm_head" in name}
    judgement = peft_formulas.judge(base, case.adapter, case.name)
    merge(base, [case.adapter], tmp_path / "out")
    exact = peft_formulas.merged(judgement.files, [judgement.changes])
    assert_rounded_once(tensors_of(tmp_path / "out"), exact, wide)
    assert tensors_of(tmp_path / "out")["lm_head.bias"].dtype == torch.float32


# Tied heads


def assert_nothing_written(tmp_path):
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", UNTIED)
def test_changes_that_would_untie_the_head_are_refused_without_untie(tmp_path, judged, name, dry_run):
    case, _ = judged(name)
    with pytest.raises(AdaptkitError, match=r"lm_head|embed_tokens|wte") as caught:
        merge(case.base, [case.adapter], tmp_path / "out", dry_run=dry_run)
    assert "--untie" in caught.value.hint
    assert_nothing_written(tmp_path)


def test_a_second_adapter_that_changes_only_the_tied_embedding_is_refused(tmp_path, judged):
    """The first one changes embedding and head alike."""
    one, other = judged("embedding_tied_ensured")[0], judged("embedding_tied")[0]
    with pytest.raises(AdaptkitError) as caught:
        merge(one.base, [one.adapter, other.adapter], tmp_path / "out")
    assert "--untie" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("saved_tied_ensured", "lm_head.weight"),
        ("embedding_tied_ensured", "lm_head.lora_A.weight"),
        ("resized_tied", "lm_head.weight"),
        ("resized_embedding_tied_ensured", "lm_head.base_layer.weight"),
        ("tokens_resized_tied", "lm_head.token_adapter.trainable_tokens_delta"),
    ],
)
def test_a_tied_head_that_differs_from_its_embedding_in_the_adapter_is_refused(tmp_path, judged, copy_of, name, key):
    """In the running model they are one tensor; the order of loading decides which of the two it gets."""
    case, _ = judged(name)
    adapter = copy_of(case.adapter)
    peft_adapters.change_tensors(adapter, lambda tensors: tensors[PREFIX + key].mul_(1.5))
    with pytest.raises((AdapterError, BaseMismatchError), match=r"lm_head|embed_tokens"):
        merge(case.base, [adapter], tmp_path / "out")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("half", ["lm_head", "model.embed_tokens"])
def test_dora_changes_of_only_one_of_embedding_and_tied_head_are_refused(tmp_path, judged, copy_of, half):
    case, _ = judged("dora_tied_ensured")
    adapter = copy_of(case.adapter)
    peft_adapters.change_tensors(adapter, lambda t: [t.pop(key) for key in list(t) if f".{half}." in key])
    with pytest.raises(AdapterError, match=r"(lm_head|embed_tokens)\.lora_magnitude_vector"):
        merge(case.base, [adapter], tmp_path / "out", MergeOptions(untie=True))
    assert_nothing_written(tmp_path)


def test_equal_replacements_of_embedding_and_head_need_no_untying(tmp_path, judged, copy_of):
    case, judgement = judged("saved_both_tied")
    adapter = copy_of(case.adapter)
    same = load_file(adapter / WEIGHTS)[f"{PREFIX}lm_head.weight"]
    peft_adapters.change_tensors(adapter, lambda t: t.update({f"{PREFIX}model.embed_tokens.weight": same.clone()}))
    merge(case.base, [adapter], tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert set(found) == set(judgement.files)
    assert torch.equal(found["model.embed_tokens.weight"], rounded_once(same.double(), torch.bfloat16))


# Names that other trainers write


def in_layers(word: str) -> Callable[[str], str]:
    """Add the name of a wrapper around every layer."""
    return lambda key: key.replace(".layers.0.", f".layers.0.{word}.").replace(".layers.1.", f".layers.1.{word}.")


def with_name(adapter: str) -> Callable[[str], str]:
    """Insert the adapter's name, as in the running model's state dict."""

    def rename(key: str) -> str:
        for word in ("lora_A", "lora_B"):
            key = key.replace(f".{word}.", f".{word}.{adapter}.")
        for word in ("lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta"):
            key = key.replace(f".{word}", f".{word}.{adapter}")
        key = key.replace(".lora_magnitude_vector", f".lora_magnitude_vector.{adapter}.weight")
        return key.replace("norm.weight", f"norm.modules_to_save.{adapter}.weight")

    return rename


NAMES: dict[str, Callable[[str], str]] = {
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "of the model without its head": lambda key: key.replace(f"{PREFIX}model.", PREFIX),
    "another name of the adapter": with_name("my-run_2"),
    "compiled inside": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "data parallel, no prefix": lambda key: f"module.{key.removeprefix(PREFIX)}",
    "sharded": lambda key: "_fsdp_wrapped_module." + in_layers("_fsdp_wrapped_module")(key),
    "checkpointed": in_layers("_checkpoint_wrapped_module"),
    "all of these": lambda key: (
        "module._orig_mod._fsdp_wrapped_module."
        + in_layers("_fsdp_wrapped_module._checkpoint_wrapped_module")(with_name("default")(key))
    ),
    "wrapped twice": lambda key: PREFIX + key,
    "language model in a vision model": lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
    "language model, old nesting": lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}language_model.model."),
}


def weights_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("model*.safetensors")}


@pytest.mark.parametrize("naming", NAMES)
def test_tensor_names_of_other_trainers_are_understood(tmp_path, judged, copy_of, plain, naming):
    case, _ = judged("everything")
    adapter = copy_of(case.adapter)
    peft_adapters.rename_keys(adapter, NAMES[naming])
    assert set(load_file(adapter / WEIGHTS)) != set(load_file(case.adapter / WEIGHTS))
    merge(case.base, [adapter], tmp_path / "out", MergeOptions(undo=False))
    assert weights_of(tmp_path / "out") == plain(case)


@pytest.fixture
def plain(made):
    """Return the weight files of a merge of a case's unchanged adapter; merge each only once."""

    def merged(case):
        out = made / f"merged-{case.name}"
        if not out.exists():
            merge(case.base, [case.adapter], out, options_for(case.case))
        return weights_of(out)

    return merged


def test_tensor_names_with_an_unknown_wrapper_are_refused(tmp_path, judged, copy_of):
    case, _ = judged("linear")
    adapter = copy_of(case.adapter)
    peft_adapters.rename_keys(adapter, lambda key: key.replace(PREFIX, f"{PREFIX}wrapped."))
    with pytest.raises(BaseMismatchError, match=r"changes wrapped\.model\.layers\.0\..*_proj\.weight, which") as caught:
        merge(case.base, [adapter], tmp_path / "out")
    assert caught.value.hint
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("prefix", ["model.", "transformer."])
def test_a_base_saved_without_the_prefix_of_its_body_is_accepted(tmp_path, judged, copy_of, prefix):
    """As GPT-2 is on the Hub."""
    case, _ = judged({"model.": "linear_patterns", "transformer.": "conv1d"}[prefix])
    base = copy_of(case.base, "base")
    for path in base.glob("model*.safetensors"):
        tensors = load_file(path)
        save_file({name.removeprefix(prefix): t for name, t in tensors.items()}, path, {"format": "pt"})
    if (base / INDEX).exists():
        index = json.loads((base / INDEX).read_text())
        index["weight_map"] = {name.removeprefix(prefix): file for name, file in index["weight_map"].items()}
        (base / INDEX).write_text(json.dumps(index))
    merge(base, [case.adapter], tmp_path / "out")
    merge(case.base, [case.adapter], tmp_path / "plain")
    plain = tensors_of(tmp_path / "plain")
    found = tensors_of(tmp_path / "out")
    assert set(found) == {name.removeprefix(prefix) for name in plain}
    assert all(torch.equal(found[name.removeprefix(prefix)], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize(("name", "says"), [("linear_mica", True), ("conv1d_square", False)])
def test_a_wrong_fan_in_fan_out_is_corrected_as_by_peft(tmp_path, judged, copy_of, plain, name, says):
    """These matrices are square, so shapes do not show that it is wrong; peft warns and sets it back."""
    case, _ = judged(name)
    adapter = copy_of(case.adapter)
    peft_adapters.change_config(adapter, fan_in_fan_out=says)
    merge(case.base, [adapter], tmp_path / "out")
    assert weights_of(tmp_path / "out") == plain(case)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        # peft loads the biases that the file contains, which then look like copies of a different base's.
        ("biases_lora_only", lambda adapter: peft_adapters.change_config(adapter, bias="none"), r"q_proj\.bias"),
        # The file contains the embedding that A and B were trained on; peft replaces the base's with it.
        (
            "embedding_rslora",
            lambda adapter: peft_adapters.change_tensors(
                adapter, lambda t: t[f"{PREFIX}model.embed_tokens.base_layer.weight"].mul_(1.25)
            ),
            r"embed_tokens\.weight",
        ),
    ],
    ids=["biases", "embedding"],
)
def test_a_tensor_copied_from_a_different_base_is_refused(tmp_path, judged, copy_of, name, change, error):
    case, _ = judged(name)
    adapter = copy_of(case.adapter)
    change(adapter)
    with pytest.raises(BaseMismatchError, match=rf"{error} is not the tensor.*own copy of it differs") as caught:
        merge(case.base, [adapter], tmp_path / "out")
    assert caught.value.hint
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("loaded", "saved"),
    [(torch.float16, torch.float16), (torch.float16, torch.float32), (torch.bfloat16, torch.float16)],
)
def test_a_copied_embedding_that_differs_only_by_dtype_conversions_is_accepted(
    tmp_path, judged, copy_of, loaded, saved
):
    """On older GPUs a bfloat16 base is loaded in float16, which peft converts to float32 before training.

    Older releases of peft did not save a copy; then the base's is used.
    """
    case, _ = judged("embedding_rslora")
    base, adapter, name = copy_of(case.base, "loaded"), copy_of(case.adapter), "model.embed_tokens"
    path = next(path for path in base.glob("*.safetensors") if f"{name}.weight" in load_file(path))
    with edited_tensors(path) as tensors:
        tensors[f"{name}.weight"][::3] *= 2.0**-22  # too small for float16 to represent exactly
        copy = tensors[f"{name}.weight"].to(loaded).to(saved)
    peft_adapters.change_tensors(adapter, lambda t: t.update({f"{PREFIX}{name}.base_layer.weight": copy}))
    merge(base, [adapter], tmp_path / "out")
    peft_adapters.change_tensors(adapter, lambda t: t.pop(f"{PREFIX}{name}.base_layer.weight"))
    merge(base, [adapter], tmp_path / "other")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "other")


# Tokenizers


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin", "pytorch_model.bin"])
def test_a_value_head_beside_the_adapter_is_left_out_with_a_note(tmp_path, judged, copy_of, name):
    """LLaMA-Factory saves it beside the adapter of a reward model, which does not work without it; TRL, one of PPO."""
    case, _ = judged("linear_rslora")
    adapter = copy_of(case.adapter)
    (adapter / name).write_bytes(b"not read")
    told = merge(case.base, [adapter, adapter], tmp_path / "out").notes
    assert sum(note.startswith(f"{adapter}: {name} is left out") for note in told) == 1
    assert not (tmp_path / "out" / name).exists()


def test_the_adapters_tokenizer_replaces_the_bases_until_it_is_unmerged(tmp_path, judged, copy_of):
    from transformers import AutoTokenizer

    case, _ = judged("resized")
    adapter = copy_of(case.adapter)
    plain = {path.name for path in adapter.iterdir()}
    tokenizer = tiny.write_tokenizer(adapter)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|result|>"]})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    (adapter / "added_tokens.json").write_text("{}")  # which the base does not have
    brought = {path.name for path in adapter.iterdir()} - plain
    assert brought >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"}
    for name in ("README.md", "training_args.bin", "trainer_state.json", "generation_config.json"):
        (adapter / name).write_text("{}")
    merge(case.base, [adapter], tmp_path / "out")
    for name in brought:
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes(), name
    kept = "generation_config.json"
    assert (tmp_path / "out" / kept).read_bytes() == (case.base / kept).read_bytes()
    added = {path.name for path in (tmp_path / "out").iterdir()} - {path.name for path in case.base.iterdir()} - brought
    assert all(name.startswith("adaptkit-") for name in added)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer) == 303
    verify(tmp_path / "out")
    assert_undone(tmp_path / "out", [adapter], case.base)


# Several adapters


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        *((("resized",), (weight,)) for weight in (0.5, 0.0, 2.0)),
        *(((name,), (0.5,)) for name in ("resized_embedding", "tokens_resized_tied")),
        *((names, (1.0, 1.0)) for names in (("resized", "embedding"), ("embedding", "resized"))),
        (("resized", "resized_down"), (1.0, 1.0)),
    ],
)
def test_vocabularies_that_cannot_be_added_are_refused(tmp_path, judged, names, weights):
    """The base has no rows that a share of the new ones, or another adapter's rows, could be added to."""
    cases = [judged(name)[0] for name in names]
    with pytest.raises(AdaptkitError, match=r"embed_tokens|lm_head|vocab") as caught:
        merge(cases[0].base, [case.adapter for case in cases], tmp_path / "out", MergeOptions(weights=weights))
    assert caught.value.hint
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("name", ["resized", next(iter(UNTIED))])
@pytest.mark.parametrize("levels", [["top"], ["text_config"], ["top", "text_config"], []], ids=str)
def test_every_level_of_the_configuration_that_has_a_value_is_updated(tmp_path, judged, copy_of, name, levels):
    """Multimodal configurations may have a value twice; an untied head is always recorded in text_config too."""
    case, _ = judged(name)
    base = copy_of(case.base, "base")
    config = json.loads((base / "config.json").read_text())
    key = "vocab_size" if case.case.vocabulary else "tie_word_embeddings"
    new = case.case.vocabulary or False
    old = config.pop(key)
    config["text_config"] = {"other": 1}
    for level in levels:
        (config if level == "top" else config[level])[key] = old
    (base / "config.json").write_text(json.dumps(config))
    merge(base, [case.adapter], tmp_path / "out", options_for(case.case))
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"top": new} if "top" in levels or not levels else {}
    expected |= {"text_config": new} if "text_config" in levels or new is False else {}
    where = {"top": found, "text_config": found["text_config"]}
    assert {level: part[key] for level, part in where.items() if key in part} == expected
    assert found["text_config"]["other"] == 1


def test_memory_does_not_hold_the_undo_record(tmp_path):
    name, random = "model.layers.0.mlp.up_proj", torch.Generator().manual_seed(1)
    base, folder = tmp_path / "base", tmp_path / "adapter"
    settings = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}
    for path, key, config in ((base, f"{name}.weight", {}), (folder, f"{PREFIX}{name}.weight", settings)):
        path.mkdir()
        (path / ("adapter_config.json" if config else "config.json")).write_text(json.dumps(config))
        weight = torch.randn(8192, 2048, generator=random).bfloat16()
        save_file({key: weight}, path / ("adapter_model.safetensors" if config else "model.safetensors"))

    def peak_of(work):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    without, with_it = (
        peak_of(lambda undo=undo: merge(base, [folder], tmp_path / f"{undo}", MergeOptions(undo=undo, threads=1)))
        for undo in (False, True)
    )
    (record,) = (tmp_path / "True" / "adaptkit-undo").glob("shard-*")
    assert with_it - without < record.stat().st_size
    assert peak_of(lambda: unmerge(tmp_path / "True", [folder], tmp_path / "back", threads=1)) < record.stat().st_size


def test_an_undo_record_maps_the_frames_of_one_tensor_at_a_time(tmp_path):
    path, frames = tmp_path / "frames", {f"layer{number}": bytes([number]) * 100_000 for number in range(8)}

    def mapped_bytes():
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
        return sum(int(end, 16) - int(start, 16) for start, end in (line[0].split("-") for line in lines))

    with contextlib.closing(UndoRecord(path, b"header")) as record:
        for name, frame in frames.items():
            record.add(name, frame[:70_000])
            record.add(name, frame[70_000:])
        for name, frame in frames.items():
            assert record[name].tobytes() == frame
            assert mapped_bytes() == 0, "mapped pages count as memory of the process"
        held = record["layer3"]
        assert held[0] == 3
        assert 100_000 <= mapped_bytes() <= 100_000 + 2 * mmap.PAGESIZE
        assert set(record) == {*frames, *record.others}
