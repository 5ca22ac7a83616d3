"""What ``stack`` does: which changes of which adapters belong together."""
