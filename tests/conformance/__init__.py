"""A conformance suite for any NBD server: a table of cases (``cases/*.toml``) and one runner.  See README.md."""
