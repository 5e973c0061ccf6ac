"""Slurm support: render job scripts, parse job states, and run Slurm's commands.

`client` runs the commands, for `backend` and `discover`. The other modules are pure and
are tested without a cluster.
"""
