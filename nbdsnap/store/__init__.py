"""Where bytes lie: the index, the exception store and the origins.

Nothing here decides what is preserved or freed; that is the engine's.  Every operation on a data file goes through one
:class:`~nbdsnap.store.fileio.FileIO`, so that a test can make any of them fail.
"""
