"""`kcm demo`: the real thing in small, from few labels to a better device, with a report."""
