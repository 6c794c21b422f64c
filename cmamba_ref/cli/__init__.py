"""The command `cmamba`; importing it imports nothing heavy."""

from cmamba_ref.cli.main import main, run

__all__ = ["main", "run"]
