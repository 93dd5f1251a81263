"""The command line, and all that knows names, flags, output directories and reports.

The library does not import this package.
"""

from jaxmeta.cli.main import EXIT_OTHER, EXIT_STOPPED, EXIT_USER, main, program

__all__ = ["EXIT_OTHER", "EXIT_STOPPED", "EXIT_USER", "main", "program"]
