"""What runs in driver and worker processes: user code, and the pickling around it."""
