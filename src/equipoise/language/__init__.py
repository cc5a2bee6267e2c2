"""A small vision-language model: encoder, connector, causal language model; and where its words look."""
