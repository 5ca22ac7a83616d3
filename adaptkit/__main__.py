"""``python -m adaptkit``, which is also how torchrun starts it."""

from adaptkit.cli.main import main

if __name__ == "__main__":
    main()
