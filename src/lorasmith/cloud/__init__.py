"""A run on a rented machine: the quote, the SkyPilot task, and the way home. Imports neither torch nor training."""
