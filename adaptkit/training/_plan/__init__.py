"""Parts of ``plan``: measuring what a training run keeps in memory, on fake tensors."""
