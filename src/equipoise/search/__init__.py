"""Cross-modal search: an index over a shared space, and the gallery of what was found."""
