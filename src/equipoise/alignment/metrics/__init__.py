"""Metrics of alignment: retrieval, compositionality, embedding spaces."""
