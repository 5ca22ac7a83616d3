"""Entry point of ``python -m adaptkit``, which torchrun uses too."""

from adaptkit.cli.main import main

if __name__ == "__main__":
    main()
