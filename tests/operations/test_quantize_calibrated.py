"""Calibration: the same layout, smaller output errors; a companion adapter bound to its base; a bits budget."""

import shutil
import tempfile

import bitsandbytes as bnb
import pytest
import tiny
import torch
from folders import tree
from safetensors.torch import load_file

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.writer import DiskError
from adaptkit.data.windows import read_tokens
from adaptkit.errors import AdapterError, BaseMismatchError, ConflictError, DataError, OutputExistsError, UsageError
from adaptkit.formats._find import quantized_names
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import Calibration, QuantizeOptions, quantize
from adaptkit.operations.stack import stack
from adaptkit.operations.unmerge import unmerge
from adaptkit.operations.verify import verify
from adaptkit.training.config import TrainConfig
from adaptkit.training.loop import train
from adaptkit.training.network.packed import read_quantized


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"the {subject} {place}, and {n}" for n in range(9) for subject in tiny.SUBJECTS
                             for place in tiny.PLACES))  # fmt: skip
    return path


def options(text, **more):
    calibration = {name: more.pop(name) for name in ("init_rank", "bits_budget", "compensate") if name in more}
    return QuantizeOptions(calibration=Calibration((text,), 1024, 128, **calibration), **more)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, llama, text):
    """A calibrated base, its companion adapter and the report."""
    out = tmp_path_factory.mktemp("calibrated") / "llama"
    report = quantize(llama, out, options(text, init_rank=4))
    return out, out.with_name("llama-init"), report


@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_a_run_interrupted_between_companion_and_base_resumes_with_the_same_command(
    whose, llama, text, calibrated, tmp_path, monkeypatch
):
    """The companion exists before the base that it names; the companion of a different run is left unchanged."""
    publish = Output.publish

    def cut_off(self, manifest, signature=None):
        if self.final.name == "llama":
            raise KeyboardInterrupt
        publish(self, manifest, signature)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "publish", cut_off)
        with pytest.raises(KeyboardInterrupt):
            quantize(llama, tmp_path / "llama", options(text, init_rank=4))
    assert {path.name for path in tmp_path.iterdir()} == {"llama-init", "llama.partial"}
    if whose == "another's":
        shutil.rmtree(tmp_path / "llama-init")
        quantize(llama, tmp_path / "other", options(text, init_rank=2), companion=tmp_path / "llama-init")
        before = tree(tmp_path / "llama-init")
        with pytest.raises(OutputExistsError):
            quantize(llama, tmp_path / "llama", options(text, init_rank=4))
        assert tree(tmp_path / "llama-init") == before
        return
    with pytest.raises(ConflictError, match="other options"):
        quantize(llama, tmp_path / "llama", options(text, init_rank=2))
    quantize(llama, tmp_path / "llama", options(text, init_rank=4))
    assert tree(tmp_path / "llama") == tree(calibrated[0])
    assert tree(tmp_path / "llama-init") == tree(calibrated[1])


def inputs_of_linears(llama, text):
    """Record the inputs of every linear layer by hooks on transformers' model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
            )
    with torch.no_grad():
        model(read_tokens([text], llama, window=128, max_tokens=1024))
    return {name: torch.cat(found).double() for name, found in seen.items()}


def lost_outputs(inputs, source, plain, adapter=None):
    """Σ ‖(W − Q − BA) x‖² over the calibration tokens, by module."""
    lost = {}
    for name in plain:
        module = name.removesuffix(".weight")
        if module in inputs and plain[name].dim() == 2 and module != "lm_head":
            difference = source[name].double() - plain[name].double()
            if adapter is not None:
                term = adapter.modules[module]
                difference -= term.scaling * term.lora_b.double() @ term.lora_a.double()
            lost[module] = float((inputs[module] @ difference.T).square().sum())
    return lost


def test_calibration_reduces_output_errors_and_the_companion_reduces_them_further(llama, text, calibrated, tmp_path):
    folder, companion, report = calibrated
    quantize(llama, tmp_path / "absmax")
    quantize(llama, tmp_path / "nearest", options(text, compensate=False))
    source, inputs, lost = load_file(llama / "model.safetensors"), inputs_of_linears(llama, text), {}
    for made in (tmp_path / "absmax", tmp_path / "nearest", folder):
        dequantize(made, tmp_path / f"{made.name}-plain")
        plain = load_file(tmp_path / f"{made.name}-plain" / "model.safetensors")
        lost[made.name] = lost_outputs(inputs, source, plain)
        assert len(lost[made.name]) == 14
    before, nearest, after = (sum(lost[name].values()) for name in ("absmax", "nearest", folder.name))
    assert after < 0.8 * before
    assert after < 0.95 * nearest  # since errors of rounding are compensated
    with_companion = lost_outputs(inputs, source, plain, read_adapter(companion))
    assert all(with_companion[module] < lost[folder.name][module] for module in with_companion)
    assert report.calibrated == 14
    assert report.weighted_error < 0.1
    for tensor in (tensor for tensor in report.tensors if tensor.format):
        weight, error = source[tensor.name].double(), source[tensor.name].double() - plain[tensor.name].double()
        importance = inputs[tensor.name.removesuffix(".weight")].square().mean(0)
        expected = ((error.square() @ importance).sum() / (weight.square() @ importance).sum()).sqrt()
        assert tensor.weighted_error == pytest.approx(float(expected), rel=0.02)  # the file was dequantized to bfloat16
        assert tensor.relative_error == pytest.approx(float(error.norm() / weight.norm()), rel=0.02)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A small Llama whose rows are divided by groups of every size."""
    return tiny.write_llama(tmp_path_factory.mktemp("served"), hidden=128)


@pytest.mark.filterwarnings("ignore:You passed .quantization_config")
@pytest.mark.parametrize(
    ("form", "size", "zero_points"),
    [("w4a16", 32, False), ("w4a16", 32, True), ("int8", None, False), ("fp8", None, False), ("fp8", 128, False),
     ("mxfp4", None, False), ("nvfp4", None, False)],
)  # fmt: skip
def test_formats_of_servers_are_calibrated_too(served, text, tmp_path, form, size, zero_points):
    """Searched scales change outputs less than plain ones, compensated rounding less again; transformers reads it."""
    from transformers import AutoModelForCausalLM

    chosen = {"format": form, "block_size": size, "zero_points": zero_points}
    quantize(served, tmp_path / "plain", QuantizeOptions(**chosen))
    quantize(served, tmp_path / "nearest", options(text, compensate=False, **chosen))
    report = quantize(served, tmp_path / "compensated", options(text, **chosen))
    source, inputs, lost = load_file(served / "model.safetensors"), inputs_of_linears(served, text), {}
    for name in ("plain", "nearest", "compensated"):
        dequantize(tmp_path / name, tmp_path / f"{name}-16")
        decoded = load_file(tmp_path / f"{name}-16" / "model.safetensors")
        lost[name] = sum(lost_outputs(inputs, source, decoded).values())
    assert lost["nearest"] <= lost["plain"]
    assert lost["compensated"] < 0.95 * lost["nearest"]
    assert report.calibrated == 14
    if not zero_points:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "compensated", dtype=torch.bfloat16)
        with torch.no_grad():
            model(torch.arange(8)[None])  # some weights are decoded at the first use
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], decoded[name]) for name in decoded)


def test_transformers_reads_a_calibrated_base_like_a_plain_one(llama, calibrated):
    from transformers import AutoModelForCausalLM

    folder, _, report = calibrated
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    checkpoint = Checkpoint(folder)
    for name in quantized_names(checkpoint):
        layer = model.get_submodule(name.removesuffix(".weight"))
        theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(theirs, read_quantized(checkpoint, name).dequantize()), name
    plain = quantize(llama, folder.with_name("not-made"), dry_run=True)
    assert report.bytes_after == plain.bytes_after
    verify(folder)


def test_a_run_interrupted_while_writing_shards_resumes_without_calibrating_again(llama, text, calibrated, tmp_path):
    """The scratch files contain all that is needed."""

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(llama, tmp_path / "llama", options(text, init_rank=4), progress=stop)
    assert list((tmp_path / "llama.partial").glob("adaptkit-scratch-*"))

    def forbidden(done, total):
        raise AssertionError("calibrated again")

    quantize(llama, tmp_path / "llama", options(text, init_rank=4), calibration_progress=forbidden)
    assert tree(tmp_path / "llama") == tree(calibrated[0])
    assert tree(tmp_path / "llama-init") == tree(calibrated[1])


def test_the_companion_is_bound_to_its_base_and_names_the_text_by_its_hash(llama, text, calibrated, tmp_path):
    folder, companion, report = calibrated
    manifest, base = require_manifest(companion), require_manifest(folder)
    assert report.companion == str(companion)
    assert [parent.manifest_sha256 for parent in manifest.parents] == [base.sha256]
    assert {t.module: t.quantized_root for t in manifest.targets} == {t.module: t.quantized_root for t in base.targets}
    assert read_adapter(companion).only_compensates
    verify(companion)
    recorded = base.operation["options"]["calibration"]
    assert (recorded["tokens"], recorded["window"], len(recorded["files"][0])) == (1024, 128, 64)
    assert str(text) not in base.to_bytes().decode()
    with pytest.raises(UsageError, match="only offsets what quantization loses"):
        merge(llama, [companion], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_loads_the_companion(calibrated):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, companion, _ = calibrated
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu"), companion)
    ours = read_adapter(companion).modules
    layers = {name: module for name, module in adapted.named_modules() if hasattr(module, "get_delta_weight")}
    assert len(layers) == len(ours) == 14
    for name, layer in layers.items():
        term = ours[name.removeprefix("base_model.model.")]
        expected = term.scaling * term.lora_b @ term.lora_a
        assert torch.allclose(layer.get_delta_weight("default").float(), expected, rtol=1e-4, atol=1e-6)


def config(base, init, instructions, **more):
    return TrainConfig(
        base=str(base), data=(str(instructions),), init=str(init), steps=3, batch_size=2, held_out=0.0,
        compute_dtype="float32", device="cpu", learning_rate=1e-2, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, calibrated, instructions):
    out = tmp_path_factory.mktemp("trained") / "adapter"
    train(config(calibrated[0], calibrated[1], instructions), out)
    return out


def test_training_starts_from_the_companion_and_merging_subtracts_it(llama, calibrated, trained, tmp_path):
    adapter, companion = read_adapter(trained), read_adapter(calibrated[1])
    assert not adapter.only_compensates
    manifest = require_manifest(trained)
    assert {parent.role: parent.manifest_sha256 for parent in manifest.parents} == {
        "base": require_manifest(calibrated[0]).sha256,
        "init": require_manifest(calibrated[1]).sha256,
    }
    assert manifest.operation["options"]["init"] == "adapter"
    verify(trained)
    merge(llama, [trained], tmp_path / "merged")
    source, merged = load_file(llama / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    moved = 0
    for module, term in adapter.modules.items():
        begun = companion.modules[module]
        assert torch.equal(adapter.compensation[module].lora_a, begun.lora_a)
        delta = term.scaling * term.lora_b.double() @ term.lora_a.double()
        delta -= begun.scaling * begun.lora_b.double() @ begun.lora_a.double()
        expected = source[f"{module}.weight"].double() + delta
        error = (merged[f"{module}.weight"].double() - expected).abs()
        assert (error <= 2**-8 * expected.abs() + 1e-9).all(), module
        moved += int((merged[f"{module}.weight"] != source[f"{module}.weight"]).sum())
    assert moved > 0
    unmerge(tmp_path / "merged", [trained], tmp_path / "restored")
    assert (tmp_path / "restored" / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
    with pytest.raises(AdapterError, match="must not be added twice"):
        stack([trained, trained], tmp_path / "out")


def test_training_from_the_companion_of_a_different_base_is_refused(llama_nf4, calibrated, instructions, tmp_path):
    with pytest.raises(BaseMismatchError, match="belongs to another base"):
        train(config(llama_nf4, calibrated[1], instructions), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bits_budget_is_met_and_its_upgrades_are_reported(llama, text, tmp_path):
    plain = quantize(llama, tmp_path / "plain", dry_run=True).bits_per_parameter
    report = quantize(llama, tmp_path / "out", options(text, bits_budget=plain + 1.5))
    assert plain < report.bits_per_parameter <= plain + 1.5
    rates = [upgrade.gain / upgrade.extra_bytes for upgrade in report.upgrades]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) > 0
    last = {upgrade.module: upgrade.to for upgrade in report.upgrades}
    checkpoint = Checkpoint(tmp_path / "out")
    packed = {name: read_quantized(checkpoint, name) for name in quantized_names(checkpoint)}
    for name in (tensor.name for tensor in report.tensors if tensor.kept_because not in {"norm", "embedding"}):
        how = last.get(name.removesuffix(".weight"))
        if how == "16 bits":
            assert checkpoint.spec(name).dtype == "BF16"
            assert name.removesuffix(".weight") in checkpoint.config["quantization_config"]["llm_int8_skip_modules"]
        else:
            assert packed[name].block_size == (32 if how == "blocks of 32" else 64)
    assert {"16 bits", "blocks of 32"} & set(last.values())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu").train()
    dequantize(tmp_path / "out", tmp_path / "dequantized")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "dequantized").train()
    tokens = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, reference(tokens).logits)


def test_a_budget_checks_disk_space_before_measuring_and_removes_layer_outputs(llama, text, tmp_path, monkeypatch):
    """Layer outputs are written to the partial folder, and removed even if the run is interrupted."""
    chosen, free = options(text, bits_budget=7.5), [10**12]
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free[0]))
    monkeypatch.setattr(tempfile, "mkdtemp", None)
    outputs = tmp_path / "out.partial" / "adaptkit-scratch"
    told, at_work = [], []

    def cut_off(done, total):
        at_work.append(outputs.is_dir())
        raise KeyboardInterrupt

    free[0] = 10_000  # less than the weights
    with pytest.raises(DiskError, match="more bytes"):
        quantize(llama, tmp_path / "out", chosen, calibration_progress=lambda *now: told.append(now))
    assert not told
    free[0] = 250_000  # enough for them, not for the second of two layers' outputs of 1,024 tokens x 64 float32 values
    with pytest.raises(DiskError, match="more bytes"):
        quantize(llama, tmp_path / "out", chosen, calibration_progress=lambda *now: told.append(now))
    assert not told
    free[0] = 10**12
    with pytest.raises(KeyboardInterrupt):
        quantize(llama, tmp_path / "out", chosen, calibration_progress=cut_off)
    assert at_work == [True]
    assert not outputs.exists()
    outputs.mkdir()
    (outputs / "0-0").write_bytes(b"of a run that was killed")
    quantize(llama, tmp_path / "out", chosen)
    quantize(llama, tmp_path / "again", chosen)
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


@pytest.mark.parametrize("budget", [None, 7.5])
def test_threads_do_not_change_the_bytes(budget, llama, text, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for threads in (1, 2):
            chosen = options(text, init_rank=4, threads=threads, bits_budget=budget)
            quantize(llama, tmp_path / str(threads), chosen)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    assert tree(tmp_path / "1-init").keys() == tree(tmp_path / "2-init").keys()
    weights = [tree(tmp_path / f"{threads}-init")["adapter_model.safetensors"] for threads in (1, 2)]
    assert weights[0] == weights[1]


def test_invalid_options_texts_windows_budgets_and_folders_are_refused(llama, text, tmp_path):
    for make, words in (
        (lambda: Calibration(()), "no text given"),
        (lambda: Calibration((text,), window=1), "at least 2"),
        (lambda: Calibration((text,), init_rank=0), "init_rank: must be at least 1, found 0"),
        (lambda: Calibration((text,), bits_budget=17.0), "above 4 and below 16"),
        (lambda: options(text, format="fp4"), "calibration: not known for format fp4"),
    ):
        with pytest.raises(UsageError, match=words):
            make()
    (tmp_path / "empty.txt").write_text("")
    longer = QuantizeOptions(calibration=Calibration((text,), window=1_000_000, tokens=2_000_000))
    for chosen, error, words, more in (
        (options(tmp_path / "empty.txt"), DataError, "no text", {}),
        (longer, UsageError, "longer than", {}),
        (options(text, bits_budget=4.01), UsageError, "bits", {}),
        (options(text), UsageError, "no companion adapter to write", {"companion": tmp_path / "x"}),
        (options(text, init_rank=2), OutputExistsError, "out-init", {}),
    ):
        if error is OutputExistsError:
            (tmp_path / "out-init" / "theirs").mkdir(parents=True)
        with pytest.raises(error, match=words):
            quantize(llama, tmp_path / "out", chosen, **more)
        assert not (tmp_path / "out").exists()
