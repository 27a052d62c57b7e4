"""Files, tensors in files, the hub, objects that know their arguments, long work in parts."""
