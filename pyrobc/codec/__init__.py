"""The coded file: a compact network as ``.rbc`` bytes near their entropy, read back without pickle or Pyro."""

from pyrobc.codec.order import order_units
from pyrobc.codec.price import find_geometries, price_entries
from pyrobc.codec.rbc import Packing, decode, encode, pack, unpack

__all__ = ["Packing", "decode", "encode", "find_geometries", "order_units", "pack", "price_entries", "unpack"]
