"""The real Linux kernel as an NBD client, in an emulated machine."""
