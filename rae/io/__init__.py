"""Files, tensor files, the hub, self-describing objects, long jobs in parts."""
