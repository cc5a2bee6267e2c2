"""Integrations with other libraries: Lightning and Hugging Face."""
