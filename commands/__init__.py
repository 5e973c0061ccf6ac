"""The command line: one short module per command, with heavy imports inside the functions."""
