"""Backends that run jobs, and the means to watch them. Imports neither torch nor ray."""
