"""Run the command line: ``python -m kdprof``."""

from kdprof.cli import main

main()
