"""Backends that run jobs, and the means to watch them. Imports neither torch nor ray.

The commands must start quickly on a login node, so importing this package loads no
heavy library. Modules that need Ray import it inside functions. `execution` is the
exception in purpose: it runs inside the job, on the nodes.
"""
