"""Preparation of a run: its batches, its model, and how many steps and checkpoint bytes it takes."""

import warnings
from importlib import import_module
from pathlib import Path

import torch

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.data.batches import Batches
from adaptkit.data.limits import pad_id
from adaptkit.models.architecture import empty_network
from adaptkit.models.memory import Memory
from adaptkit.training.config import TrainConfig
from adaptkit.training.distributed import World
from adaptkit.training.dtype_errors import reports_unsupported_dtype
from adaptkit.training.fast import accelerate
from adaptkit.training.inputs import Inputs
from adaptkit.training.memory.activations import Activations, predicted_memory, save_activations
from adaptkit.training.memory.adamw import BLOCK, STATE_BITS, AdamW, decode, encode, moment_bytes
from adaptkit.training.memory.optimizer import state_bytes
from adaptkit.training.memory.parameters import Trainable
from adaptkit.training.network.frozen import transient_weights
from adaptkit.training.network.model import Model, load_model
from adaptkit.training.network.probing import check_packing
from adaptkit.training.network.sharding import shard_frozen
from adaptkit.training.network.start import add_trainable
from adaptkit.training.out_of_memory import reports_out_of_memory
from adaptkit.training.schedule import steps_in
from adaptkit.training.triton_needs import has_triton


def checkpoint_bytes(config: TrainConfig, parameters: int) -> int:
    """Return the bytes of a checkpoint: parameters, two moments and, if there may be one, the best parameters."""
    vectors = 2 if config.eval_every else 1
    return 4 * parameters * vectors + moment_bytes(parameters, STATE_BITS[config.optimizer])


def expected_memory(
    model: Model, trainable: Trainable, activations: Activations, config: TrainConfig, steps: int
) -> Memory:
    """Return the memory that a run will need on its device.

    On a CPU this includes a copy of the best parameters so far. A GPU's run keeps these in host memory, and one that
    evaluates only after its last step needs none.
    """
    values = trainable.values
    copies = int(0 < config.eval_every < steps and values.device.type == "cpu")
    return predicted_memory(model.network, values.numel(), state_bytes(trainable, config), activations, copies)


def batches_of(inputs: Inputs) -> Batches:
    """Return the batches of a run."""
    config, method = inputs.config, inputs.config.training_method
    return Batches(
        inputs.samples,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        seed=config.seed,
        padding=pad_id(inputs.tokenizer, inputs.base),
        group_by_length=config.group_by_length,
        pack_length=method.pack_length,
        mixture=inputs.mixture,
        make=method.collate,
    )


def largest_batch(config: TrainConfig, batches: Batches, processes: int = 1) -> tuple[int, int]:
    """Return the largest number of sequences in a micro-batch of any process, and the length of the longest."""
    rows, length = batches.largest(processes)
    return config.training_method.sequences * rows, length


def total_steps(config: TrainConfig, batches: Batches) -> int:
    """Return how many steps a run takes, unless it stops early."""
    return config.steps or steps_in(config.epochs or 1, batches.steps_per_epoch)


def begin_libraries(base: Path, device: torch.device, shard_base: bool) -> None:
    """Import and initialize the libraries of a model, so that their memory is not counted as that of the run.

    cuBLAS allocates a workspace from torch's memory at the first matrix product in each thread: here, in this thread
    and in the one that runs backward passes.
    """
    empty_network(Checkpoint(base))
    if has_triton(device.type):
        import_module("adaptkit.training.network.decode_gpu")
    if shard_base:
        import_module("torch._dynamo")  # FSDP would do so in the first step
    if device.type == "cuda":
        for dtype in (torch.float32, torch.bfloat16):
            square = torch.zeros((64, 64), dtype=dtype, device=device, requires_grad=True)
            with warnings.catch_warnings():  # once per process, about the thread of backward passes; torch sets it up
                warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no", UserWarning)
                torch.autograd.backward((square @ square).sum())
        torch.cuda.synchronize(device)


def begin_run(inputs: Inputs, device: torch.device) -> None:
    """Load what would otherwise be loaded, and counted, while the memory of a run is measured."""
    begin_libraries(inputs.base, device, inputs.config.shard_base)
    if device.type == "cpu":
        _load_step_kernels(inputs.config)


def _load_step_kernels(config: TrainConfig) -> None:
    """Load the compiled CPU kernels that steps call and ``build`` does not; call it before that."""
    dtype = getattr(torch, config.compute_dtype)
    square = torch.zeros((64, 64), dtype=dtype, requires_grad=True)
    torch.autograd.backward((square @ square).sum())  # maps the code of the matrix library
    vectors = [torch.zeros(BLOCK) for _ in range(4)]
    AdamW(0.0, 1, 0.0).update(*([vector] for vector in vectors))
    if STATE_BITS[config.optimizer] == 8:
        codes, absmax = torch.zeros(BLOCK, dtype=torch.uint8), torch.zeros(1)
        encode(vectors[0], codes, absmax, signed=True)
        decode(codes, absmax, vectors[0], signed=True)


@reports_out_of_memory(
    "while the model was loaded",
    hint="use a base that adaptkit quantize made, several GPUs with --shard-base, or --device cpu",
)
def build(inputs: Inputs, world: World, largest: tuple[int, int]) -> tuple[Model, Activations]:
    """Build the model with its initial adapter, and set which activations it saves.

    Args:
        inputs: inputs of the run.
        world: processes of the run.
        largest: rows and length of the largest micro-batch.

    Raises:
        UsageError: the device has too little memory, transformers cannot compute the architecture in this dtype, or
            ``add_trainable`` or ``save_activations`` refuses the settings.
    """
    with reports_unsupported_dtype(inputs.base, inputs.config.compute_dtype):
        device, is_shared = world.device, inputs.config.shard_base
        held = torch.device("cpu") if is_shared else device  # unsharded, the base need not fit the device
        model = load_model(inputs.base, getattr(torch, inputs.config.compute_dtype), held)
        with transient_weights(model.network):
            add_trainable(model, inputs.config, inputs.start, inputs.tokenizer)
            if inputs.config.training_method.pack_length is not None:
                check_packing(model.network)
            if inputs.config.fast:
                accelerate(model.network, model.dtype, device, model.output_layer, is_sharded=is_shared)
        activations = save_activations(model.network, inputs.config, largest, device)
        if is_shared:  # after measuring, which stops a pass halfway: processes would wait for each other
            shard_frozen(model.network, world, model.checkpoint.release_pages)
        return model, activations
