"""The object store: arenas, who has which bytes of them, and what they hold."""
