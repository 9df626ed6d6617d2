"""The command `pyro-vae`: lists commands and their help without loading torch."""

from __future__ import annotations

import sys

from pyro_vae.cli import COMMANDS, completion, help_of


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<10}{command.help}" for name, command in COMMANDS.items())
        print(f"usage: pyro-vae COMMAND [options]\n\n{lines}\n\npyro-vae COMMAND --help for more")
        return 0
    if argv[0] == "--version":
        from pyro_vae import __version__

        print(__version__)
        return 0
    if argv == ["--completion"]:
        print(completion(), end="")
        return 0
    if argv[0] in COMMANDS and {"-h", "--help"} & {*argv}:
        print(help_of(argv[0]), end="")
        return 0
    try:
        from pyro_vae.cli.parsing import run

        return run(argv)
    except KeyboardInterrupt as stop:
        print(f"\npyro-vae {argv[0]}: interrupted{stop}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
