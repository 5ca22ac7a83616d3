"""From rows of data files to batches: rows, conversations, rendered text, samples of tokens, batches."""
