"""``python -m megatron_pipeweaver`` is ``pipeweaver``."""

import sys

from megatron_pipeweaver.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
