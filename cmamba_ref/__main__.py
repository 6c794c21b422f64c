"""`python -m cmamba_ref` is `cmamba`."""

from cmamba_ref.cli import run

run()
