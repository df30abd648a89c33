"""The node manager of a rank: its workers, its tasks, its part of the object store."""
