"""Test tools that ship with hpcray: whole jobs in one process, without MPI, sockets or real workers."""
