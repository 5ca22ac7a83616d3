"""Parts of ``stack``: matching the changes of several adapters."""
