"""The tests: a package, so that all of them share :mod:`tests.support`."""
