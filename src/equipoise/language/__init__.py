"""A small vision-language model: encoder, connector, causal language model; and whether its words look at what they name."""
