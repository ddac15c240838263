"""A MiniMax-M2 of a few hundred thousand parameters that knows who won the World Series in 2020."""
