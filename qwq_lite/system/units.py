"""Bytes of a MiB and of a GiB."""

MIB, GIB = 1 << 20, 1 << 30
