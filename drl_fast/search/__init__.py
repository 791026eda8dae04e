"""Search in one's own videos: an index of windows in LanceDB, exact scores, hits as spans of time."""
