"""A run -> a model for other programs: merged with proof, as GGUF, on the Hub with a card."""
