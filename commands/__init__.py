"""The command line: one short module per command, with heavy imports inside the functions.

`lorafleet --help` must not load torch or Ray, which take seconds;
`tests/unit/commands/test_cli.py` checks it. A command parses options, calls the layers below,
and prints. Data goes to standard output; progress and notes go to standard error. The
docstring of a command is its help text.
"""
