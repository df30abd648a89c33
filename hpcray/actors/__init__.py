"""The user's side of actors: classes, handles, methods."""
