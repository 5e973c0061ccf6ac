"""Train one adapter on one or more processes, with exact resume from checkpoints.

This package contains everything that happens inside the processes of one trial: the
base model, the training method, the strategy, the loop, and checkpoints. It does not
know Ray Tune, the run folder or other trials; `tuning` adds those. Only `launch` uses
Ray.
"""
