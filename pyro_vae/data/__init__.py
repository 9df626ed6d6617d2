"""Data sets, their three parts, and the transforms between the file and the model."""

from pyro_vae.data.data import Data, alike, kind_of
from pyro_vae.data.schema import Column, Schema
from pyro_vae.data.splits import Splits, load_data, read_rows, spread
from pyro_vae.data.sprites import Sprites, read_dsprites
from pyro_vae.data.tables import read_table
from pyro_vae.data.transforms import (
    Binarise,
    Dequantise,
    Identity,
    Rescale,
    Standardise,
    Threshold,
    Transform,
    declare,
    make_transform,
    restore,
)
from pyro_vae.runtime import epoch_order

__all__ = [
    "Binarise",
    "Column",
    "Data",
    "Dequantise",
    "Identity",
    "Rescale",
    "Schema",
    "Splits",
    "Sprites",
    "Standardise",
    "Threshold",
    "Transform",
    "alike",
    "declare",
    "epoch_order",
    "load_data",
    "kind_of",
    "make_transform",
    "read_dsprites",
    "read_rows",
    "read_table",
    "restore",
    "spread",
]
