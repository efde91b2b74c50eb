"""The protocol's parsers against anything: what they must keep to, as functions of plain bytes (:mod:`targets`)."""
