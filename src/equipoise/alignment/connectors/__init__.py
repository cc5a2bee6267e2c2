"""Modules that connect one modality to the layers of another."""
