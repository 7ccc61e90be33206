"""``python -m lens_kernels`` is the ``lens-kernels`` command."""

from lens_kernels.cli import main

raise SystemExit(main())
