"""Where runs go, and how they are watched. Imports neither torch nor ray."""
