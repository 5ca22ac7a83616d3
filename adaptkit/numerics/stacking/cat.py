"""Concatenation: A matrices one under the other, B matrices side by side. Exact; ranks add up."""

from adaptkit.numerics.lora import concatenate
from adaptkit.numerics.stacking._method import Method

METHOD = Method(concatenate, source="LoRA Soups (arXiv:2410.13025), CAT, with the scalings moved into B")
