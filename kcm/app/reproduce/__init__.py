"""`kcm reproduce`: the paper's tables in shape, with this suite's data and models, and the paper's rows beside."""
