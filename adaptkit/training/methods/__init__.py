"""Training methods: each is one file, its ``METHOD``; ``_method`` says what a method owns."""
