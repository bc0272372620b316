"""Packs + model -> adapter."""
