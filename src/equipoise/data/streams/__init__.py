"""Streams: tables whose rows are read in order and never held in memory together."""
