"""The NBD protocol without I/O: no socket, no clock, no thread; bytes in, bytes and events out.

::

    constants     numbers, magics and byte layouts, by the names of the protocol document
    session       what a server offers (ExportInfo, ExportSource) and what a handshake agreed on (Session)
    options       the data of options, taken apart
    negotiation   the handshake, as a state machine
    transmission  requests: found in a buffer, then checked
    replies       replies and chunks, put together

The document: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, and its branch
extension-ext-header for extended headers.  "proto.md" in a docstring means these.
"""
