"""A transformers model, entered at its seams."""
