"""Protocol buffers: the only thing that edge and cloud share besides kcm."""
