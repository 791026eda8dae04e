"""Models around open_clip's towers. Needs the ``video`` extra (open_clip)."""
