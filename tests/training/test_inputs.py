"""A run resumes only with the inputs that it began with."""

import peft_adapters
import pytest
from interrupted import stop_after

from adaptkit.errors import ConflictError
from adaptkit.training.config import TrainConfig
from adaptkit.training.loop import train


@pytest.mark.parametrize(("changes", "goes_on"), [({"lora_alpha": 999}, False), ({"inference_mode": False}, True)])
def test_resuming_is_refused_if_the_scale_of_the_initial_adapter_changed(
    changes, goes_on, llama, adapter, instructions, copy_of, tmp_path
):
    start = copy_of(adapter)
    config = TrainConfig(
        base=str(llama), data=(str(instructions),), init=str(start), steps=4, batch_size=2, device="cpu"
    )
    stop_after(config, tmp_path / "trained", 2)
    peft_adapters.change_config(start, **changes)
    if goes_on:
        assert train(config, tmp_path / "trained").resumed_from == 2
    else:
        with pytest.raises(ConflictError, match="another adapter to start from"):
            train(config, tmp_path / "trained")
