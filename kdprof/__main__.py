"""``python -m kdprof``."""

from kdprof.cli import main

main()
