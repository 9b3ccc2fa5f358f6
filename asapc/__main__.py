"""Entry of the command: `asapc`, `python -m asapc`, and so `torchrun -m asapc`."""

from asapc.process.interrupts import handled


def main() -> None:
    """Run the command, with signals handled before its modules are imported, which takes a moment."""
    with handled():
        from asapc.cli import main

        main()


if __name__ == "__main__":
    main()
