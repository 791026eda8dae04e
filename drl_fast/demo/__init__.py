"""The demo: generated clips, the ablation in small, and its report; or one's own videos."""
