"""The command `cmamba`; importing it imports nothing heavy."""

from cmamba_ref.cli.commands import main, run

__all__ = ["main", "run"]
