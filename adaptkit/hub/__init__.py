"""To and from the Hugging Face Hub: the only importer of huggingface_hub.

Tokens come from the environment or from huggingface_hub's own login, and appear in no message.
"""
