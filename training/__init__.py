"""Train one adapter on one or more processes, with exact resume from checkpoints."""
