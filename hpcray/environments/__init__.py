"""Runtime environments at work: packed by whoever asks for one, set up by the worker that runs in it."""
