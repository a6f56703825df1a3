"""`kcm eval`: how a run routes on its frozen test split, beside every baseline of the protocol."""
