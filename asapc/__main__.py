"""Lets `python -m asapc`, and so `torchrun -m asapc`, do what the command does."""

from asapc.cli import main

if __name__ == "__main__":
    main()
