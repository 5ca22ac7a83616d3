"""Everything that a run reads, checked before anything is written."""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.adapter import Adapter, adapter_identity
from adaptkit.checkpoint.hashing import tensors_root
from adaptkit.checkpoint.layout import GENERATION_NAME, check_side_files, read_small, side_files
from adaptkit.checkpoint.manifest import Manifest, read_manifest
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError
from adaptkit.networks.activations import parse_policy
from adaptkit.text.chat_template import TEMPLATE_NAME, check_template, read_template, set_template_kwargs, template_of
from adaptkit.text.tokenizer_files import (
    brings_tokenizer,
    is_of_tokenizer,
    is_template,
    load_tokenizer,
    load_tokenizer_of,
)
from adaptkit.text.windows import check_known, check_prompt, known_tokens, longest_sequence
from adaptkit.training.config import INITS, TrainConfig
from adaptkit.training.data.dataset import Dataset, load_data, split
from adaptkit.training.data.encoding import prompt_ids
from adaptkit.training.data.ending import generation_naming, unnamed_end
from adaptkit.training.data.mixture import Mixture
from adaptkit.training.data.samples import Sample
from adaptkit.training.device import choose_device, choose_dtype, name_of
from adaptkit.training.network.lineage import check_config
from adaptkit.training.network.start import read_start, resolve_method
from adaptkit.training.trackers import require_trackers


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        config: of the run, with its method and compute_dtype resolved.
        base: folder of the base.
        manifest: of the base, if it has one.
        state: of the base's files, which tells bases without a manifest apart.
        tokenizer: of the base, or of the adapter to begin with, with the run's chat template.
        chat_template: if it is not the base's.
        unnamed_end: the token that ends answers, if the base does not name it.
        side_files: small files that lie beside what is made, or take the place of the base's, by name.
        data: every sample, and what happened on the way.
        samples: to train on.
        held_out: to measure on.
        held_out_data: where the held-out samples came from, if not from the same data.
        mixture: what an epoch draws of the samples; None is all of them.
        start: the adapter to begin with, if not fresh matrices.
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
    mixture: Mixture | None
    start: Adapter | None

    def identity(self) -> dict[str, Any]:
        """What a run that goes on must agree in with the one that it goes on from."""
        template = self.chat_template
        return {
            "options": self.config.decisive(),
            "base": self.manifest.sha256 if self.manifest else self.state,
            "data": [_digest(self.samples), _digest(self.held_out)],
            "init": [tensors_root(self.start.records), adapter_identity(self.start)] if self.start else None,
            **({} if template is None else {"chat_template": hashlib.sha256(template.encode()).hexdigest()}),
        }

    def require_base(self) -> None:
        """Refuse to go on with a base that changed since it was checked: its weights are read all the time.

        Raises:
            IntegrityError: its files are not those that were there.
        """
        Checkpoint(self.base).require_state(self.state)


def read_inputs(config: TrainConfig, output: Path | None, force: bool) -> Inputs:
    """Read and check everything but the base's weights.

    Args:
        config: of the run.
        output: folder that will be made; None if none will.
        force: whether it may be there.

    Raises:
        CheckpointError, UsageError, DataError: base, output or data cannot be used.
    """
    base = Path(config.base)
    checkpoint = Checkpoint(base)
    config = resolve_method(config, checkpoint)
    device = choose_device(config.device)
    parse_policy(config.checkpointing, layers=1)  # what it means for the network is known once that is built
    if config.offload_checkpoints and device.type != "cuda":
        raise UsageError(
            "offload_checkpoints: needs a GPU; on a CPU, checkpoints are in host memory already",
            hint="leave it out; --checkpointing sqrt keeps fewer checkpoints",
        )
    dtype = choose_dtype(config.compute_dtype, device)
    if config.method == "full":
        check_side_files(base)  # which lie beside what is made, too
    config = replace(config, compute_dtype=name_of(dtype))
    require_trackers(config)
    if output is not None:
        others = [*([] if config.init in INITS else [config.init]), *filter(None, [config.chat_template])]
        check_output(output, force, [base, *map(Path, (*config.data, *config.held_out_data, *others))])
        if config.tensorboard is not None and Path(config.tensorboard).resolve().is_relative_to(output.resolve()):
            raise UsageError(
                f"tensorboard: {config.tensorboard} is inside the output folder", hint="choose another folder"
            )
    manifest = read_manifest(base)
    if manifest is not None:
        check_config(base, manifest)
    start = read_start(config, manifest)
    tokenizer, template = _tokenizer(config, start)
    set_template_kwargs(tokenizer, config.chat_template_kwargs)
    known = known_tokens(base)
    for prompt in config.sample_prompts:
        ids = prompt_ids(prompt, tokenizer)
        check_prompt(base, prompt, len(ids), config.sample_tokens)
        check_known(ids, known, f"the prompt {prompt[:40]!r}")
    weights = config.mixture_weights()
    load = partial(
        load_data,
        tokenizer=tokenizer,
        max_length=config.max_length,
        too_long=config.too_long,
        loss_on=config.loss_on,
        layout=config.layout,
        context=longest_sequence(base),
        known=known,
    )
    data = load(config.data)
    other = load(config.held_out_data) if config.held_out_data else None
    samples, held_out = split(data.samples, 0 if other else config.held_out, config.seed)
    end = unnamed_end(base, tokenizer) if data.talks else None
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
        mixture=Mixture.of(samples, weights, config.data) if weights else None,
        start=start,
    )


def _tokenizer(config: TrainConfig, start: Adapter | None) -> tuple[Any, str | None]:
    """The tokenizer of a run, and its chat template if that is not the base's."""
    base = Path(config.base)
    tokenizer = load_tokenizer_of(base, start.root if start else None)
    if config.chat_template is not None:
        tokenizer.chat_template = check_template(read_template(Path(config.chat_template)), config.chat_template)
    is_given = config.chat_template is not None or start is not None
    own = load_tokenizer(base).chat_template if is_given else tokenizer.chat_template
    return tokenizer, None if tokenizer.chat_template in (own, None) else template_of(tokenizer)


def _side_files(config: TrainConfig, start: Adapter | None, template: str | None, end: int | None) -> dict[str, bytes]:
    """See ``Inputs.side_files``."""
    found = {}
    if start is not None and (template is not None or brings_tokenizer(start.root)):
        belongs = is_of_tokenizer if brings_tokenizer(start.root) else is_template
        found = {name: read_small(path) for name, path in side_files(start.root).items() if belongs(name)}
    if config.chat_template is not None:
        found = {name: content for name, content in found.items() if not is_template(name)}
    if template is not None:
        found[TEMPLATE_NAME] = template.encode()
    if end is not None:
        found[GENERATION_NAME] = generation_naming(Path(config.base), end)
    return found


def _digest(samples: Sequence[Sample]) -> str:
    """Tells whether a run that goes on has the data, as tokens of the same sources, that it began with."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(array("q", [sample.origin, len(sample.ids)]).tobytes())
        digest.update(sample.content())
    return digest.hexdigest()
