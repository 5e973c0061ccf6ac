"""Slurm: scripts rendered, states read, a thin client. Pure but for the client."""
