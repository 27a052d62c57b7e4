"""The error of a configuration."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what it takes, or the nearest right one."""
