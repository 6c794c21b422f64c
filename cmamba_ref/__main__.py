"""`python -m cmamba_ref` is `cmamba`."""

import sys

from cmamba_ref.cli import main

sys.exit(main())
