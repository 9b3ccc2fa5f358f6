"""Writes the page of the options."""

from itertools import groupby

from asapc.config import OPTIONS

PAGE_HEAD = """\
# Options

The options of `asapc compile` that stand on the command line, in a TOML file for `--config` or in Python. `--config`,
`--trust-config`, `--json` and `--quiet` stand on the command line alone. `asapc inspect`, `verify` and `costs` take
those that apply to them and have some of their own, which `--help` lists. In a TOML file an option has the name of
its flag without dashes (`input-shape = "x=2,197,64"`, `O = 1`) or its name in Python, and one that repeats takes one
value or a list. The command line wins over the file. `--model` and `--unsafe-load` make code run, and stand in the
file only where `--trust-config` says that you trust it. In Python options are arguments of `asapc.CompileConfig`.

This page is the output of `asapc.writing.options_page.options_page()`."""


def options_page() -> str:
    """Write docs/options.md."""
    lines = [PAGE_HEAD]
    for group, options in groupby(OPTIONS.values(), key=lambda option: option.group):
        lines += ["", f"## {group or 'General'}", ""]
        lines += ["| option | in Python | default | what it does |", "|---|---|---|---|"]
        for option in options:
            usage = f"{option.flag} {option.metavar}".strip().replace("|", "\\|")
            lines.append(f"| `{usage}` | `{option.name}` | {option.shown_default} | {option.help} |")
    return "\n".join(lines) + "\n"
