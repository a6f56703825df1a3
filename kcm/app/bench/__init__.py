"""`kcm bench`: routing on recorded outcomes, the edge beside bare parts of the same run, and one measurement against another."""
