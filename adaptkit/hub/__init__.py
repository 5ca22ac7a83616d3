"""Publishing to and downloading from the Hugging Face Hub; the only package that imports huggingface_hub.

Tokens come from the environment or from huggingface_hub's own login, and never appear in messages.
"""
