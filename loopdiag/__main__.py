"""`python -m loopdiag`."""

from loopdiag.cli import main

main()
