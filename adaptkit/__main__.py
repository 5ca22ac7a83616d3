"""Entry point of ``python -m adaptkit``, which torchrun uses too."""

from adaptkit.cli.main import program

if __name__ == "__main__":
    program()
