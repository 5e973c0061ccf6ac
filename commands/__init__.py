"""What a person types: one short file a command, heavy imports inside the function."""
