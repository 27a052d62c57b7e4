"""The YAML files of the authors' code, key by key."""
