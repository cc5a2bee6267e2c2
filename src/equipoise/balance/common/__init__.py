"""Functions that several balancers share."""
