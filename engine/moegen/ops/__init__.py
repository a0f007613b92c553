"""Functions of tensors: attention over pages, grouped experts, sampling."""
