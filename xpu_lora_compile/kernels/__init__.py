"""Plain functions over tensors: what runs when an op is called."""
