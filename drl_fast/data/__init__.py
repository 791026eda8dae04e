"""Videos and captions, from annotation files to batches. Needs the ``video`` extra (PyAV, torchvision)."""
