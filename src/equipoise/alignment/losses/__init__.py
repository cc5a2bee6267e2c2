"""Losses over aligned pairs."""
