"""Settings of a training run; each field is an option of ``adaptkit train`` and a key of its configuration file."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from adaptkit.checkpoint.patterns import check_pattern
from adaptkit.data.conversation import LAYOUTS
from adaptkit.errors import ConfigError
from adaptkit.settings import refuse, setting
from adaptkit.training.methods._method import TrainingMethod, combined_settings, default_method, settings_of_others
from adaptkit.training.other_names import OTHER_NAMES

COMPUTE_DTYPES = ("auto", "bfloat16", "float32")
METHODS = ("auto", "lora", "qlora", "full")
BIASES = ("none", "all", "lora_only")
INITS = ("kaiming", "normal")
_SET_BY_INIT = ("rank", "alpha", "targets", "exclude", "target_parameters", "rslora", "rank_pattern", "alpha_pattern")
_ADAPTER = (
    *("init", "dropout", "dora", "lora_plus_ratio", "lora_bias", "bias", "modules_to_save", "trainable_tokens"),
    *_SET_BY_INIT,
)
"""Settings that apply only to adapters. An adapter named by ``init`` determines those in ``_SET_BY_INIT``."""
_APART = (
    ("lora_bias", "dora", ""),
    *((name, "target_parameters", ", as in peft") for name in ("dora", "dropout", "lora_bias")),
    ("epochs", "steps", ""),
)
"""Settings of which only one may be given, with the reason."""
TOO_LONG = ("cut", "drop", "error")
OPTIMIZERS = ("adamw", "adamw8bit")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
LOWER_THE_RATE = "start over (--force) with a lower learning rate"
"""Hint for a run that diverged; without ``--force``, another rate is refused beside its unfinished work."""
_MAX_FACTOR = 1e30
"""Upper limit of factors: float32 holds 3.4e38, and products of factors need headroom."""
_SEEDS = (1 << 40) - 1
"""Largest magnitude of the seed: batches add the epoch to a million times the seed, in 64 bits."""
_MAX_COUNT = 1 << 31
"""Upper limit of steps and batch sizes: far more than a run can take, and small enough to compute with."""

_SETS = ("targets", "exclude", "target_parameters", "modules_to_save")  # order and duplicates have no meaning
_NOT_RECORDED = frozenset({"base", "data", "held_out_data", "chat_template", "device", "tensorboard", "wandb"})
_CHANGEABLE_ON_RESUME = frozenset(
    {
        "save_every", "keep_checkpoints", "optimizer_pages_mib", "page_kib", "checkpointing", "offload_checkpoints",
        "on_non_finite",
    }
)  # fmt: skip
"""Settings that a resumed run may change: they do not affect the bytes of the adapter trained so far."""

_MethodSettings: Any = combined_settings()


@dataclass(frozen=True)
class TrainConfig(_MethodSettings):  # type: ignore[misc]  # known only when the files of the methods are found
    """Settings of a training run."""

    other_names: ClassVar[Mapping[str, str]] = OTHER_NAMES

    base: str = setting(
        "Base checkpoint: 16-bit, or quantized by adaptkit. A folder, or org/name[@revision] on the Hub.",
        section="Model and data",
    )
    data: tuple[str, ...] = setting("File (jsonl, ndjson, json, csv, tsv, parquet) or Hub dataset "
                                    "(org/name[/config][@revision][:split]).")  # fmt: skip
    init: str = setting("Initialization of A: kaiming (uniform, as in PEFT) or normal (standard deviation 1 / rank); "
                        "or an adapter to start from, a folder or org/name[@revision], which determines rank, alpha "
                        "and targets.",
                        "kaiming")  # fmt: skip
    method: str = setting("auto: qlora on a base that adaptkit quantized, lora on a 16-bit one; full: train every "
                          "weight and write a checkpoint.", "auto", choices=METHODS)  # fmt: skip

    rank: int = setting("Rank of the adapter's matrices.", 16, at_least=1, at_most=1 << 16, section="Adapter")
    alpha: float = setting("The adapter's change is scaled by alpha / rank.", 32.0, above=0, at_most=_MAX_FACTOR)
    targets: tuple[str, ...] = setting("Shell pattern of module paths that get an adapter; * matches every linear "
                                       "layer that processes text, except routers and the output layer.",
                                       ("*",))  # fmt: skip
    exclude: tuple[str, ...] = setting("Shell pattern of module paths to exclude from targets.", ())
    target_parameters: tuple[str, ...] = setting("Shell pattern of stacked expert matrices that get an adapter, such "
                                                 "as *.experts.*.", ())  # fmt: skip
    dropout: float = setting("Dropout on the adapter's input.", 0.0, at_least=0, below=1)
    rslora: bool = setting("Scale by alpha / √rank instead (rsLoRA).", False)
    dora: bool = setting("Also train the norms of the weights' rows (DoRA).", False)
    rank_pattern: Mapping[str, float] | None = setting("Rank of matching modules: a regular expression for the end of "
                                                       "the path, as in PEFT.", None, at_least=1,
                                                       at_most=1 << 16)  # fmt: skip
    alpha_pattern: Mapping[str, float] | None = setting("Alpha of matching modules, in the same way.", None, above=0,
                                                        at_most=_MAX_FACTOR)  # fmt: skip
    lora_plus_ratio: float = setting("Learning rate of B relative to A; LoRA+ suggests 16.", 1.0, above=0,
                                     at_most=_MAX_FACTOR)  # fmt: skip
    lora_bias: bool = setting("Also train a bias on B; can be merged only into layers that have a bias.", False)
    bias: str = setting("Biases to train; lora_only: those of layers with an adapter.", "none",
                        choices=BIASES)  # fmt: skip
    modules_to_save: tuple[str, ...] = setting("Module to train in full, by the end of its path, such as lm_head or "
                                               "norm.", ())  # fmt: skip
    trainable_tokens: tuple[str, ...] = setting("Token, by its text or ID, whose embedding row is trained.", ())

    layout: str | None = setting("Layout of the rows.  [default: detected for each row]", None, choices=LAYOUTS,
                                 section="Samples")  # fmt: skip
    chat_template: str | None = setting("Jinja file to use instead of the model's chat template; it is saved with the "
                                        "adapter, and merge takes it along.", None)  # fmt: skip
    chat_template_kwargs: Mapping[str, str | int | float | bool] | None = setting(
        "Variables of the chat template, such as enable_thinking=false.", None
    )
    max_length: int = setting("Maximum tokens per sample.", 1024, at_least=2)
    too_long: str = setting("What to do with longer samples.", "cut", choices=TOO_LONG)
    mixture: Mapping[str, float] | None = setting("Weight of a data file in an epoch, relative to the others; 1 if "
                                                  "not given.", None, above=0, at_most=_MAX_FACTOR)  # fmt: skip
    held_out: float | None = setting("Fraction of the rows to evaluate on instead of training on; ignored with "
                                     "held_out_data.  [default: 0.1, at most 1,000 rows]", None, at_least=0,
                                     below=1)  # fmt: skip
    held_out_data: tuple[str, ...] = setting("File or Hub dataset to evaluate on instead.", ())

    steps: int | None = setting("Optimizer steps.  [default: determined by epochs]", None, at_least=1,
                               at_most=_MAX_COUNT, section="Steps")  # fmt: skip
    epochs: float | None = setting("Passes over the data, instead of steps.  [default: 1]", None, above=0,
                                   at_most=1e6)  # fmt: skip
    batch_size: int = setting("Samples per step.", 8, at_least=1, at_most=_MAX_COUNT)
    micro_batch_size: int | None = setting("Samples per forward pass, at most batch_size.  "
                                           "[default: the whole batch]", None, at_least=1,
                                           at_most=_MAX_COUNT)  # fmt: skip
    group_by_length: bool = setting("Group samples of similar length into steps, to reduce padding.", False)
    on_non_finite: str = setting("If the loss or a gradient is NaN or infinite: stop, or skip the step and count it.",
                                 "stop", choices=("stop", "skip"))  # fmt: skip
    seed: int = setting("Seed of A's initialization, sample order, dropout and the held-out split.", 0,
                        at_least=-_SEEDS, at_most=_SEEDS)  # fmt: skip

    eval_every: int = setting("Steps between evaluations of the held-out loss; 0: only before and after training.", 0,
                              at_least=0, section="Evaluation and checkpoints")  # fmt: skip
    patience: int = setting("Stop after this many evaluations without a better held-out loss; 0: never.", 0,
                            at_least=0)  # fmt: skip
    keep: str = setting("Adapter to publish: the one with the best held-out loss, or the last; the other is saved "
                        "beside it.", "best", choices=("best", "last"))  # fmt: skip
    save_every: int = setting("Steps between checkpoints; 0: only at the end or on interruption.", 50, at_least=0)
    keep_checkpoints: int = setting("Number of checkpoints to keep; older ones are deleted.", 2, at_least=1)

    learning_rate: float = setting("Peak learning rate.", 2e-4, above=0, at_most=_MAX_FACTOR, section="Optimizer")
    schedule: str = setting("Learning rate schedule after the warm-up.", "constant", choices=SCHEDULES)
    decay: float = setting("Fraction of the steps over which wsd decays the learning rate.", 0.2, above=0, at_most=1)
    warmup: float = setting("Fraction of the steps used for learning rate warm-up.", 0.03, at_least=0, below=1)
    weight_decay: float = setting("Weight decay of AdamW.", 0.0, at_least=0, at_most=_MAX_FACTOR)
    max_grad_norm: float = setting("Clip gradients to this norm; 0: no clipping.", 1.0, at_least=0)
    neftune_alpha: float = setting("NEFTune noise on the embeddings during training; 5 is usual, 0 is off.", 0.0,
                                   at_least=0, at_most=_MAX_FACTOR)  # fmt: skip

    sample_prompts: tuple[str, ...] = setting("Prompt to answer during training.", (), section="Answers and trackers")
    sample_every: int = setting("Steps between answers to the prompts; 0: only after the last step.", 0, at_least=0)
    sample_tokens: int = setting("Maximum tokens per answer.", 64, at_least=1)
    tensorboard: str | None = setting("Folder for TensorBoard logs.", None)
    wandb: str | None = setting("Weights & Biases project.", None)

    optimizer: str = setting("adamw: 32-bit moments; adamw8bit: 8-bit moments, with a constant for every 256.",
                             "adamw", choices=OPTIMIZERS, section="Memory and device")  # fmt: skip
    checkpointing: str = setting("Activation checkpointing: none, layer, sqrt (segments of √n layers), segments:K, "
                                 "budget:MIB (the least recomputation within the budget), or auto: on a GPU the least "
                                 "recomputation that fits in memory, on a CPU layer.", "auto")  # fmt: skip
    offload_checkpoints: bool = setting("Keep the inputs of segments in host memory; GPU only.", False)
    optimizer_pages_mib: float | None = setting("MiB of optimizer state to keep resident; the rest is paged to host "
                                                "memory, or on a CPU to a file.  [default: all of it]", None, above=0,
                                                at_most=_MAX_FACTOR)  # fmt: skip
    page_kib: int | None = setting(
        "Size of a page of optimizer state, in KiB.  [default: 2048 on a CPU, 8192 on a GPU]",
        None,
        at_least=1,
        at_most=1 << 20,
    )
    compute_dtype: str = setting("Dtype of activations and dequantized weights; auto: bfloat16 if the device "
                                 "multiplies bfloat16 matrices, else float32.", "auto",
                                 choices=COMPUTE_DTYPES)  # fmt: skip
    device: str = setting("cpu, cuda, or auto.", "auto")
    shard_base: bool = setting("Shard the frozen weights across the processes that torchrun starts (FSDP2).", False)
    deterministic: bool = setting("On a GPU, use only deterministic operations, so that a resumed run produces the "
                                  "same bytes; runs on a CPU always do.", False)  # fmt: skip

    fast: bool = setting("Whether to replace parts of the network by faster ones, which round otherwise.", True,
                         hidden=True)  # fmt: skip

    def validate(self) -> None:
        """See ``Settings``."""
        for name in ("data", "held_out_data"):
            if not all(getattr(self, name)) or not self.data:
                refuse(self, name, "must name files or datasets, none of them empty")
        if not self.targets and not self.target_parameters:
            refuse(self, "targets", "must not be empty without target_parameters")
        for name in ("base", "init", "chat_template", "tensorboard", "wandb"):
            if getattr(self, name) == "":
                refuse(self, name, "must not be empty")
        self._check_adapter()
        for name, other, why in _APART:
            if getattr(self, name) and getattr(self, other):
                message = f"{name}: cannot be combined with {other}{why}"
                raise ConfigError(message, hint="leave out one of the two")
        self.training_method.check()
        self.mixture_weights()
        self._check_steps()
        if self.patience and not (self.has_held_out and self.eval_every):
            raise ConfigError(
                "patience: needs eval_every and held-out data", hint="set eval_every, and held_out or held_out_data"
            )
        if self.eval_every and not self.has_held_out:
            raise ConfigError("eval_every: needs held-out data", hint="set held_out or held_out_data")
        if self.shard_base and self.checkpointing not in ("auto", "none", "layer"):
            raise ConfigError(
                "shard_base: works only with checkpointing auto, layer or none",
                hint="use one of these, or leave out shard_base",
            )
        if self.shard_base and self.method == "full":
            raise ConfigError(
                "shard_base: cannot be combined with method full, which has no frozen weights",
                hint="leave out shard_base, or use method lora or qlora",
            )
        for name in ("sample_every", "sample_tokens"):
            if getattr(self, name) != getattr(TrainConfig, name) and not self.sample_prompts:
                raise ConfigError(f"{name}: needs sample_prompts", hint=f"set sample_prompts, or leave out {name}")

    def _check_adapter(self) -> None:
        """Refuse adapter settings that contradict each other.

        Raises:
            ConfigError: names one.
        """
        given = [name for name in _ADAPTER if getattr(self, name) != getattr(TrainConfig, name)]
        if self.method == "full" and given:
            raise ConfigError(
                f"{given[0]}: does not apply to method full, which makes no adapter",
                hint=f"leave out {given[0]}, or use method lora or qlora",
            )
        set_by_init = next((name for name in given if name in _SET_BY_INIT), None)
        if self.init not in INITS and set_by_init:
            raise ConfigError(
                f"{set_by_init}: is determined by the adapter to start from", hint=f"leave out {set_by_init}, or init"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            if not all(map(_is_expression, getattr(self, name) or {})):
                refuse(self, name, "keys must be regular expressions")
        if any(rank != int(rank) for rank in (self.rank_pattern or {}).values()):
            refuse(self, "rank_pattern", "values must be whole numbers")

    def _check_steps(self) -> None:
        """Refuse settings of the steps that contradict each other.

        Raises:
            ConfigError: names one.
        """
        if self.decay != TrainConfig.decay and self.schedule != "wsd":
            raise ConfigError("decay: applies only to schedule wsd", hint="leave out decay, or use schedule wsd")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ConfigError(
                f"micro_batch_size: {self.micro_batch_size} samples per forward pass are more than the "
                f"{self.batch_size} per step (batch_size)",
                hint=f"set batch_size to {self.micro_batch_size}, or leave out micro_batch_size",
            )

    def mixture_weights(self) -> list[float] | None:
        """Return the weight of each source in order, looked up by source or file name; 1 if it is not given.

        Raises:
            ConfigError: a name matches no source or several, two names match the same source, or there is only one.
        """
        if self.mixture is None:
            return None
        weights = dict[int, float]()
        for name, weight in self.mixture.items():
            found = [number for number, source in enumerate(self.data) if source == name]
            found = found or [number for number, source in enumerate(self.data) if Path(source).name == name]
            if len(found) != 1 or found[0] in weights:
                several = "is the name of several of the data" if len(found) > 1 else "is named twice"
                problem = several if found else "is not one of the data"
                raise ConfigError(f"mixture: {name!r} {problem}", hint=f"name one of the data: {', '.join(self.data)}")
            weights[found[0]] = float(weight)
        if len(self.data) == 1:
            raise ConfigError("mixture: has no effect on a single source", hint="leave out mixture, or give more data")
        return [weights.get(number, 1.0) for number in range(len(self.data))]

    @property
    def training_method(self) -> TrainingMethod:
        """The method of the run, which owns rows, batches and loss."""
        return default_method()(self)

    @property
    def has_held_out(self) -> bool:
        """Whether the run has held-out samples."""
        return self.held_out != 0 or bool(self.held_out_data)

    def recorded(self) -> dict[str, Any]:
        """Return what the manifest records: all but paths, devices and trackers, which do not affect the result."""
        left_out = _NOT_RECORDED | settings_of_others(self.training_method)
        values = {name: value for name, value in asdict(self).items() if name not in left_out}
        values["epochs"] = self.epochs or 1.0
        if self.fast:
            del values["fast"]  # an unusual run alone says so
        values |= {name: sorted(set(values[name])) for name in _SETS}
        values["mixture"] = self.mixture_weights()
        for name in ("rank_pattern", "alpha_pattern"):  # lists: the first match wins, and JSON objects are unordered
            values[name] = values[name] and [[pattern, number] for pattern, number in values[name].items()]
        if self.init in INITS:
            return values
        own = {name: value for name, value in values.items() if name not in _SET_BY_INIT}  # they are the adapter's
        return own | {"init": "adapter"}  # the manifest names it as a parent

    def decisive(self) -> dict[str, Any]:
        """Return the settings that determine the result: a resumed run must have the same."""
        return {name: value for name, value in self.recorded().items() if name not in _CHANGEABLE_ON_RESUME}


def _is_expression(text: str) -> bool:
    try:
        check_pattern(text)
    except re.error:
        return False
    return True
