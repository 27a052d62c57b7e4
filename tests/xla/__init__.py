"""What runs on an XLA device: needs torch_xla, so it has an environment of its own (``make test-xla``)."""
