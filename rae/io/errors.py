"""The error of a configuration."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what it takes, or the nearest right one."""


_PATHS = {
    "LatentsDataModule": "/path/to/latents/train (rae-cache-latents makes them)",
    "ShardsDataModule": "'/path/to/train-{0000..0146}.tar' (or a folder of .tar files)",
}
"""What ``data.train_path`` looks like, by the data module's class; for all others it is a folder."""


def no_train_path(kind: str, key: str = "data") -> ConfigError:
    """The error of a data module, by the name of its class and its key, that is not told where its training samples are."""
    if kind == "HubDataModule":
        return ConfigError(
            f"{key}.repo is not given; add {key}.repo=owner/name (a data set on the hub), or the path of a folder"
        )
    example = _PATHS.get(kind, "/path/to/imagenet/train (a folder with one subfolder a class)")
    return ConfigError(f"{key}.train_path is not given; add {key}.train_path={example}")
