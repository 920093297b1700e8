"""`python -m mlcawq` is the `mlcawq` program."""

from mlcawq.cli.main import main

main()
