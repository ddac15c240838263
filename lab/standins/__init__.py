"""What stands in for things that the lab has no hardware for."""
