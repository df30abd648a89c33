"""The global control store on rank 0: which nodes there are, who has room, where actors live."""
