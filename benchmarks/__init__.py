"""nbdsnap side by side with other NBD servers, on the same data and the same machine: see README.md.

Not a part of the installed package: ``python -m benchmarks`` runs it from a checkout.
"""
