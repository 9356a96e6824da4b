"""`python -m agwm_jax` is `agwm`."""

import sys

from agwm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
