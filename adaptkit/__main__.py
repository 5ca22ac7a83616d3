"""``python -m adaptkit``, which is also how torchrun starts it."""

from adaptkit.cli.main import program

if __name__ == "__main__":
    program()
