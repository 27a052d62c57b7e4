"""Data modules and image transforms."""

from rae.data.digits import DigitsDataModule, DigitsDataset
from rae.data.folder import ImageFolder, ImageFolderDataModule
from rae.data.latents import CachedLatents, LatentsDataModule
from rae.data.loader import SeededDataset
from rae.data.mixture import MixtureDataModule
from rae.data.module import ImageDataModule
from rae.data.pictures import PicturesDataModule, PicturesDataset
from rae.data.sampler import ShardedBatchSampler
from rae.data.shards import ShardsDataModule, TarShards
from rae.data.synthetic import SyntheticDataModule, SyntheticDataset
from rae.data.transforms import ImageTransform

__all__ = [
    "CachedLatents",
    "DigitsDataModule",
    "DigitsDataset",
    "ImageDataModule",
    "ImageFolder",
    "ImageFolderDataModule",
    "ImageTransform",
    "LatentsDataModule",
    "MixtureDataModule",
    "PicturesDataModule",
    "PicturesDataset",
    "SeededDataset",
    "ShardedBatchSampler",
    "ShardsDataModule",
    "SyntheticDataModule",
    "SyntheticDataset",
    "TarShards",
]
