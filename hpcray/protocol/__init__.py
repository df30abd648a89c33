"""What processes say to each other: `messages` (the declarations) and `codec` (frames)."""
