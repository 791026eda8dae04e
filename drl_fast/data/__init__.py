"""Videos, captions and what is made of them before a model sees it. Needs the ``video`` extra (PyAV, torchvision)."""
