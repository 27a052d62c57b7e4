"""Configuration errors."""


class ConfigError(ValueError):
    """The configuration is invalid; the message names the key and what it accepts, or the nearest valid key."""


_PATHS = {
    "LatentsDataModule": "/path/to/latents/train (rae-cache-latents makes them)",
    "ShardsDataModule": "'/path/to/train-{0000..0146}.tar' (or a folder of .tar files)",
}
"""Examples of ``data.train_path`` by data module class; for all others it is a folder."""


def no_train_path(kind: str, key: str = "data") -> ConfigError:
    """The error for a data module, given its class name and key, whose training samples have no path."""
    if kind == "HubDataModule":
        return ConfigError(
            f"{key}.repo is not given; add {key}.repo=owner/name (a data set on the hub), or the path of a folder"
        )
    example = _PATHS.get(kind, "/path/to/imagenet/train (a folder with one subfolder a class)")
    return ConfigError(f"{key}.train_path is not given; add {key}.train_path={example}")
