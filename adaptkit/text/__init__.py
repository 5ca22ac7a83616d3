"""From rows, conversations and text to the tokens that a model reads of them."""
