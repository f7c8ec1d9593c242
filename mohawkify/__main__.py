"""`python -m mohawkify`: the command line, for launchers that start a module."""

from mohawkify.cli.main import NAME, main

main(prog_name=NAME)
