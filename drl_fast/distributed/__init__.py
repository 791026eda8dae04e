"""Process groups: agreement between ranks, rows gathered with gradients, exchange of videos."""
