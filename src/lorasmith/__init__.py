"""Teach a LLaMA-family model what a team knows."""

__version__ = "0.1.0"
