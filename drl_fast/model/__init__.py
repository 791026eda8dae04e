"""The retrieval model, built on open_clip's towers. Needs the ``video`` extra (open_clip)."""
