"""Inputs of a run: everything it reads, checked before anything is written."""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.adapter import Adapter, adapter_identity
from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.integrity import read_input_manifest
from adaptkit.checkpoint.layout import CONFIG_NAME, GENERATION_NAME, read_small
from adaptkit.checkpoint.manifest import Manifest, TensorRecord, tensors_root
from adaptkit.checkpoint.place import check_output, refuse_inside_artifact
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.side_files import check_side_files, side_files
from adaptkit.data.chat_template import TEMPLATE_NAME, check_template, read_template, set_template_kwargs, template_of
from adaptkit.data.dataset import Dataset
from adaptkit.data.encoding import Sample, prompt_ids
from adaptkit.data.ending import generation_naming, unnamed_end
from adaptkit.data.limits import check_prompt, check_vocabulary, context_length, vocabulary_size
from adaptkit.data.sampling import HELD_OUT, Mixture, default_held_out, split
from adaptkit.data.tokenizer_files import (
    has_tokenizer,
    is_of_tokenizer,
    is_template,
    load_tokenizer,
    load_tokenizer_of,
)
from adaptkit.errors import UsageError
from adaptkit.models.activations import parse_policy
from adaptkit.training.config import INITS, TrainConfig
from adaptkit.training.device import choose_device, choose_dtype, name_of
from adaptkit.training.network.start import read_start, resolve_method
from adaptkit.training.result import records_of
from adaptkit.training.trackers import require_trackers


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run.

    Attributes:
        config: settings of the run, with method, compute_dtype and held_out resolved.
        base: folder of the base.
        manifest: manifest of the base; None if it has none.
        state: sizes and modification times of the base's files, which identify a base without a manifest.
        tokenizer: tokenizer of the base, or of the adapter to start from, with the run's chat template.
        chat_template: chat template of the run; None if it is the base's.
        unnamed_end: token that ends answers; None if the base's configuration names it.
        side_files: small files to write beside the result, where they replace those of the base, by name.
        data: all samples of ``data``, and counts of what was cut or dropped.
        samples: samples to train on.
        held_out: samples to evaluate on.
        held_out_data: dataset of the held-out samples; None if they were held out of ``data``.
        held_out_limited: whether only the most rows of the default are held out, and not a tenth.
        mixture: what an epoch draws from the samples; None if it uses all of them.
        start: adapter to start from; None if there is none.
    """

    config: TrainConfig
    base: Path
    manifest: Manifest | None
    state: Any
    tokenizer: Any
    chat_template: str | None
    unnamed_end: int | None
    side_files: Mapping[str, bytes]
    data: Dataset
    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    held_out_data: Dataset | None
    held_out_limited: bool
    mixture: Mixture | None
    start: Adapter | None

    def identity(self) -> dict[str, Any]:
        """Return everything that must be the same when a run is resumed."""
        template = self.chat_template
        return {
            "options": self.config.decisive(),
            "base": self.manifest.sha256 if self.manifest else self.state,
            "data": [_digest(self.samples), _digest(self.held_out)],
            "init": [tensors_root(self.start.records), adapter_identity(self.start)] if self.start else None,
            **({} if template is None else {"chat_template": hashlib.sha256(template.encode()).hexdigest()}),
        }

    @cached_property
    def records(self) -> dict[str, TensorRecord]:
        """The base's tensors, by name; if it has no manifest, all of them are read and hashed."""
        return records_of(Checkpoint(self.base), self.manifest)

    def contents(self) -> str | None:
        """Return a hash of the configuration and tensors of a base without a manifest; None if it has one."""
        if self.manifest is not None:
            return None
        parts = file_sha256(self.base / CONFIG_NAME), tensors_root(self.records.values())
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def require_base(self) -> None:
        """Refuse to continue with a base that changed since it was checked: its weights are read all the time.

        Raises:
            IntegrityError: the base's files changed.
        """
        Checkpoint(self.base).require_state(self.state)


def read_inputs(config: TrainConfig, output: Path | None, force: bool) -> Inputs:
    """Read and check everything but the base's weights.

    Args:
        config: settings of the run.
        output: folder that will be created; None if none will.
        force: whether the output may exist.

    Raises:
        CheckpointError, UsageError, DataError: base, output or data cannot be used.
    """
    base = Path(config.base)
    checkpoint = Checkpoint(base)
    manifest = read_input_manifest(base)
    config = _resolved(config, checkpoint)
    if config.method == "full":
        check_side_files(base)  # they are copied beside the result
    require_trackers(config)
    if output is not None:
        _check_places(config, output, force)
    start = read_start(config, manifest)
    tokenizer, template = _tokenizer(config, start)
    _check_prompts(config, tokenizer)
    weights = config.mixture_weights()
    data = _load(config, config.data, tokenizer)
    other = _load(config, config.held_out_data, tokenizer) if config.held_out_data else None
    fraction = config.held_out
    if fraction is None:
        fraction = HELD_OUT if other else default_held_out(data.samples)
    is_limited = config.held_out is None and fraction < HELD_OUT
    config = replace(config, held_out=fraction)
    samples, held_out = split(data.samples, 0 if other else fraction, config.seed)
    end = unnamed_end(base, tokenizer) if data.has_conversations else None
    return Inputs(
        config=config,
        base=base,
        manifest=manifest,
        state=checkpoint.state(),
        tokenizer=tokenizer,
        chat_template=template,
        unnamed_end=end,
        side_files=_side_files(config, start, template, end),
        data=data,
        samples=samples,
        held_out=other.samples if other else held_out,
        held_out_data=other,
        held_out_limited=is_limited,
        mixture=Mixture.of(samples, weights, config.data) if weights else None,
        start=start,
    )


def _resolved(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """Return the settings with method and compute_dtype resolved; refuse those that the device does not support."""
    config = resolve_method(config, checkpoint)
    device = choose_device(config.device)
    parse_policy(config.checkpointing, layers=1)  # syntax only: what it means needs the built network
    if config.offload_checkpoints and device.type != "cuda":
        raise UsageError(
            "offload_checkpoints: needs a GPU; on a CPU, checkpoints are in host memory already",
            hint="leave it out; --checkpointing sqrt keeps fewer checkpoints",
        )
    return replace(config, compute_dtype=name_of(choose_dtype(config.compute_dtype, device)))


def _check_places(config: TrainConfig, output: Path, force: bool) -> None:
    """Check where the run will write."""
    others = [*([] if config.init in INITS else [config.init]), *filter(None, [config.chat_template])]
    check_output(output, force, map(Path, (config.base, *config.data, *config.held_out_data, *others)))
    if config.tensorboard is not None:
        logs = Path(config.tensorboard)
        if logs.resolve().is_relative_to(output.resolve()):
            raise UsageError(f"tensorboard: {logs} is inside the output folder", hint="choose another folder")
        refuse_inside_artifact(logs, f"tensorboard: {logs} is", "folder")


def _tokenizer(config: TrainConfig, start: Adapter | None) -> tuple[Any, str | None]:
    """Return the tokenizer of a run, ready to render, and its chat template if that is not the base's."""
    base = Path(config.base)
    tokenizer = load_tokenizer_of(base, start.root if start else None)
    if config.chat_template is not None:
        tokenizer.chat_template = check_template(read_template(Path(config.chat_template)), config.chat_template)
    is_given = config.chat_template is not None or start is not None
    own = load_tokenizer(base).chat_template if is_given else tokenizer.chat_template
    template = None if tokenizer.chat_template in (own, None) else template_of(tokenizer)
    set_template_kwargs(tokenizer, config.chat_template_kwargs)
    return tokenizer, template


def _check_prompts(config: TrainConfig, tokenizer: Any) -> None:
    """Check that the model has room and tokens for the prompts and their answers."""
    base = Path(config.base)
    for prompt in config.sample_prompts:
        ids = prompt_ids(prompt, tokenizer)
        check_prompt(base, prompt, len(ids), config.sample_tokens)
        check_vocabulary(ids, vocabulary_size(base), f"the prompt {prompt[:40]!r}")


def _load(config: TrainConfig, sources: Sequence[str], tokenizer: Any) -> Dataset:
    base = Path(config.base)
    return config.training_method.read(sources, tokenizer, context_length(base), vocabulary_size(base))


def _side_files(config: TrainConfig, start: Adapter | None, template: str | None, end: int | None) -> dict[str, bytes]:
    """Return ``Inputs.side_files``."""
    found = {}
    if start is not None and (template is not None or has_tokenizer(start.root)):
        belongs = is_of_tokenizer if has_tokenizer(start.root) else is_template
        found = {name: read_small(path) for name, path in side_files(start.root, belongs).items()}
    if config.chat_template is not None:
        found = {name: content for name, content in found.items() if not is_template(name)}
    if template is not None:
        found[TEMPLATE_NAME] = template.encode()
    if end is not None:
        found[GENERATION_NAME] = generation_naming(Path(config.base), end)
    return found


def _digest(samples: Sequence[Sample]) -> str:
    """Return a hash of samples and their sources, which tells whether a resumed run has the same data."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(array("q", [sample.origin, len(sample.ids)]).tobytes())
        digest.update(sample.content())
    return digest.hexdigest()
