"""`python -m minitron_cli`: what torchrun launches."""

from minitron_cli.cli import main

if __name__ == "__main__":
    main()
