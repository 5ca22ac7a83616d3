"""Parts of ``extract``: its plan, the comparison of tensors, the names in the adapter, its report."""
