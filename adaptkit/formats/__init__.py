"""Formats of quantized weights: each file is one, its ``FORMAT``; ``_format`` says what a format owns.

Files whose name begins with an underscore are parts that several formats share.
"""
