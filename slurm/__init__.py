"""Slurm support: render job scripts, parse job states, and run Slurm's commands. Pure except
for the client.
"""
