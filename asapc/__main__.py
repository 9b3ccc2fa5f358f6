"""Entry of the command: `asapc`, `python -m asapc`, and so `torchrun -m asapc`."""

import gc
import sys

from asapc.process.interrupts import handled

# Looking for cycles among all that torch has loaded, after every 700 new objects, takes up to a seventh of the time.
CYCLES = (100_000, 20, 100)


def main() -> None:
    """Run the command, with signals handled before its modules are imported, which takes a moment."""
    gc.set_threshold(*CYCLES)
    with handled():
        try:
            from asapc.cli import main
        except ImportError as error:  # of typer or rich, without which not even `asapc doctor` can say so
            sys.exit(f"error: asapc cannot start: {error}\nhint: pip install --force-reinstall typer rich")
        main()


if __name__ == "__main__":
    main()
