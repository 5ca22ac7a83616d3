"""Test quantize, train, merge and unmerge with a tiny random model of every architecture of transformers.

    .venv/bin/python scripts/architectures.py [MODEL_TYPE ...] [--jobs 2] [--json FILE]

New versions of transformers bring architectures with new features, such as a norm with a gate, a weight that is read
instead of called as a module, or layers that share keys and values. This script finds those that fail, by comparing
with transformers and peft:

    quantize      the trainer's logits with those of transformers for the same weights, dequantized
    check         tensor names and shapes of the base and of its quantized files with those that transformers builds
    train         two steps on the quantized base, without a comparison
    merge         an adapter for all linear layers, merged by adaptkit, with the same merged by peft
    unmerge       the restored files with the base's, byte for byte
    trained       the trainer's logits with the trained adapter, with those of the merged model in transformers

Prints a line for every step that fails, and how many architectures pass each step. Architectures that cannot be built
as a tiny model are skipped: most of them have sizes that this script does not know how to reduce.
"""

import argparse
import contextlib
import filecmp
import io
import json
import os
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "fixtures")]

import tiny  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: E402

from adaptkit.checkpoint.adapter import read_adapter  # noqa: E402
from adaptkit.errors import AdaptkitError  # noqa: E402
from adaptkit.operations.dequantize import DequantizeOptions, dequantize  # noqa: E402
from adaptkit.operations.merge import merge  # noqa: E402
from adaptkit.operations.quantize import quantize  # noqa: E402
from adaptkit.operations.targets._checkpoint_files import read_checkpoint_files  # noqa: E402
from adaptkit.operations.unmerge import unmerge  # noqa: E402
from adaptkit.training.config import TrainConfig  # noqa: E402
from adaptkit.training.fast import accelerate  # noqa: E402
from adaptkit.training.loop import train  # noqa: E402
from adaptkit.training.network.loading import load_adapter  # noqa: E402
from adaptkit.training.network.model import load_model  # noqa: E402

STEPS = ("quantize", "check", "train", "merge", "unmerge", "trained")
IDS = torch.arange(3, 15)[None]
CPU = torch.device("cpu")
MOST_PARAMETERS, SECONDS = 30_000_000, 120
TEXT = {
    16: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head "
        "mamba_head_dim rotary_dim hidden_size_per_layer_input index_topk index_head_dim",
    8: "state_size mamba_d_state ssm_state_size mamba_n_heads mamba_num_heads laurel_rank",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads num_local_experts num_experts "
       "n_routed_experts moe_num_experts linear_num_value_heads",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_key_value_heads num_kv_heads mamba_expand "
       "num_experts_per_tok num_experts_per_token moe_k moe_topk linear_num_key_heads altup_num_inputs index_n_heads",
    1: "n_shared_experts n_group topk_group first_k_dense_replace n_groups mamba_n_groups",
    0: "moe_layer_start_index",
    128: "intermediate_size ffn_dim ffn_hidden_size n_inner d_ff decoder_ffn_dim max_position_embeddings n_positions",
    64: "hidden_size d_model n_embd dim moe_intermediate_size shared_expert_intermediate_size lru_width "
        "word_embed_proj_dim",
    32: "q_lora_rank kv_lora_rank attention_window_size sliding_window",
}  # fmt: skip
SIGHT = {
    64: "intermediate_size mlp_dim out_hidden_size vision_output_dim output_dim projector_dim projection_dim "
        "projector_input_dim projector_output_dim",
    32: "hidden_size embed_dim hidden_dim d_model",
    28: "image_size",
    16: "head_dim num_position_embeddings",
    14: "patch_size",
    2: "num_hidden_layers depth num_layers num_attention_heads num_heads num_key_value_heads",
    1: "pooling_kernel_size num_global_layers",
}  # fmt: skip
"""Small values of a configuration's numbers, by their names: ``TEXT`` for the language model, this for other parts."""


def shrunk(config: Any, sizes: dict[int, str]) -> dict[str, int]:
    """Return those of the sizes that a configuration has."""
    found = {}
    for value, names in sizes.items():
        for name in names.split():
            with contextlib.suppress(Exception):  # some raise an error on access
                if type(getattr(config, name, None)) is int:
                    found[name] = value
    return found


def configurations(kind: str, tokens: dict[str, int], vocabulary: int) -> Iterator[Any]:
    """Yield small configurations of an architecture, to be tried until one can be built."""
    build = transformers.CONFIG_MAPPING[kind]
    default = build()
    text = default.get_text_config()
    values: dict[str, Any] = shrunk(text, TEXT) | tokens | {"vocab_size": vocabulary}
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None):
            values[name] = (list(dict.fromkeys(getattr(text, name))) * 2)[:2]
    optional = [name for name in ("layer_types", "head_dim", "mlp_layer_types", "num_key_value_heads", "v_head_dim",
                                  "sliding_window", "num_local_experts", "rotary_dim") if name in values]  # fmt: skip
    others = {
        name: shrunk(part, SIGHT) | {"model_type": part.model_type}
        for name in build.sub_configs
        if (part := getattr(default, name, None)) is not None and part is not text
    }
    inside = next((name for name in build.sub_configs if getattr(default, name, None) is text), None)
    for count in (0, 1, 2):
        for dropped in combinations(optional, count):
            kept = {name: value for name, value in values.items() if name not in dropped}
            with contextlib.suppress(Exception):
                yield build(**others, **({inside: kept | {"model_type": text.model_type}} if inside else kept))


def build_tiny(kind: str, folder: Path) -> Any:
    """Save a small model of an architecture with a tokenizer, and return it; None if none can be built."""
    tokenizer = tiny.write_tokenizer(folder)
    for config in configurations(kind, tiny._token_ids(tokenizer), len(tokenizer)):
        with contextlib.suppress(Exception):  # transformers raises various errors for sizes that do not fit together
            auto = tiny.auto_class(config)
            with torch.device("meta"):
                if sum(p.numel() for p in auto.from_config(config).parameters()) > MOST_PARAMETERS:
                    continue
            torch.manual_seed(0)
            model = auto.from_config(config, dtype=torch.float32).eval()
            logits(model)
            model.save_pretrained(folder)
            return model
    return None


def logits(network: Any) -> Any:
    """Return the logits for fixed tokens, in float64."""
    with torch.no_grad():
        return network(input_ids=IDS, use_cache=False).logits.double()


def loaded(folder: Path) -> Any:
    """Load a model with transformers."""
    auto = tiny.auto_class(transformers.AutoConfig.from_pretrained(folder))
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def require_equal(found: Any, expected: Any) -> None:
    """Require that logits differ only by rounding."""
    difference = float((found - expected).norm() / expected.norm())
    if not difference < 1e-3:
        raise ValueError(f"logits differ by {difference:.1e}")


class Course:
    """The steps for one architecture.

    Args:
        root: a folder with the model in ``base``.
        model: the model.
    """

    def __init__(self, root: Path, model: Any) -> None:
        self._root, self._base, self._model = root, root / "base", model

    def quantize(self) -> None:
        """Require that the quantized model computes the same as transformers with the dequantized weights."""
        quantize(self._base, self._root / "nf4")
        dequantize(self._root / "nf4", self._root / "plain", DequantizeOptions(dtype="float32"))
        model = load_model(self._root / "nf4", torch.float32, CPU)
        accelerate(model.network, model.dtype, CPU, model.output_layer)
        require_equal(logits(model.network), logits(loaded(self._root / "plain")))

    def check(self) -> None:
        """Require that the base and its quantized files have all tensors of the architecture."""
        for folder in (self._base, self._root / "nf4"):
            files = read_checkpoint_files(folder)
            wrong = [*files.absent, *files.misshapen]
            if wrong or not files.architecture:
                raise ValueError(f"{folder.name}: {files.architecture or 'not compared'} {wrong}")

    def train(self) -> None:
        """Require that the model can be trained."""
        data = tiny.write_instructions(self._root / "rows.jsonl", rows=8)
        config = TrainConfig(
            base=str(self._root / "nf4"), data=(str(data),), steps=2, rank=2, max_length=64, device="cpu"
        )
        train(config, self._root / "adapter", note=lambda line: None)

    def merge(self) -> None:
        """Require that merging an adapter gives the same as with peft."""
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(self._model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        wrapped.save_pretrained(self._root / "peft")
        merge(self._base, [self._root / "peft"], self._root / "merged")
        require_equal(logits(loaded(self._root / "merged")), logits(wrapped.merge_and_unload().eval()))

    def unmerge(self) -> None:
        """Require that unmerge restores the base bit for bit."""
        unmerge(self._root / "merged", [self._root / "peft"], self._root / "unmerged")
        for file in self._base.glob("*.safetensors"):
            if not filecmp.cmp(file, self._root / "unmerged" / file.name, shallow=False):
                raise ValueError(f"{file.name} is not the base's")

    def trained(self) -> None:
        """Require that merging the trained adapter gives the model that was trained."""
        merge(self._base, [self._root / "adapter"], self._root / "shipped")
        model = load_model(self._base, torch.float32, CPU)
        load_adapter(model, read_adapter(self._root / "adapter"))
        require_equal(logits(loaded(self._root / "shipped")), logits(model.network))


def examine(kind: str) -> dict[str, str]:
    """Run all steps for an architecture; return for each an empty text, or what went wrong."""
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        base = Path(folder) / "base"
        base.mkdir()
        model = build_tiny(kind, base)
        if model is None:
            return {"build": "no tiny model"}
        course, found = Course(Path(folder), model), {}
        for step in STEPS:
            try:
                getattr(course, step)()
                found[step] = ""
            except AdaptkitError as error:
                found[step] = f"refused: {error.message}"
            except Exception as error:
                trace = traceback.extract_tb(error.__traceback__)[-1]
                found[step] = f"{type(error).__name__}: {error} ({Path(trace.filename).name}, line {trace.lineno})"
        return found


def in_a_process(kind: str) -> dict[str, str]:
    """Run ``examine`` in a child process, with a time limit."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), os.fdopen(writer, "w") as answer, open(os.devnull, "w") as nowhere:
            signal.alarm(SECONDS)
            os.dup2(nowhere.fileno(), 2)
            torch.set_num_threads(1)
            answer.write(json.dumps(examine(kind)))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"build": f"ended, or took more than {SECONDS} s"}


def main() -> None:
    """Examine architectures, and print the steps that fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write everything there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    known = [
        kind
        for kind, config in transformers.CONFIG_MAPPING.items()
        if any(config in auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForImageTextToText))
    ]
    kinds = options.kinds or known
    counts, everything = Counter[str](), {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for kind, found in zip(kinds, pool.map(in_a_process, kinds), strict=True):
            everything[kind] = found
            counts.update(step for step, wrong in found.items() if not wrong)
            counts["built"] += "build" not in found
            for step, wrong in found.items():
                if wrong and step != "build":
                    print(f"{kind:24} {step:10} {' '.join(wrong.split())[:200]}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))
    print(f"transformers {transformers.__version__}: {len(kinds)} architectures, {counts['built']} built")
    print("in order: " + ", ".join(f"{step} {counts[step]}" for step in STEPS))


if __name__ == "__main__":
    main()
