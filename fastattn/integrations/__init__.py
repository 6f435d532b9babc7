"""Where other people's code meets fastattn: ``functional`` (torch.nn.functional), ``flash`` (the registry of torch.nn.attention),
``huggingface`` (transformers)."""
