"""fieldlab: run experiments across a fleet of unlike machines."""
