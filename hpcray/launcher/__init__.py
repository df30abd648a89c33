"""How a job comes up: roles of the ranks, environments of their children, the driver."""
