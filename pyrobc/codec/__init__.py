"""The coded file: a compact network as ``.rbc`` bytes near their entropy, read back without pickle or Pyro."""

from pyrobc.codec.rbc import Packing, decode, encode, pack, unpack

__all__ = ["Packing", "decode", "encode", "pack", "unpack"]
