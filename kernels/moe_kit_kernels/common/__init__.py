"""Pieces that several operators share: argument checks and small cached constants."""
