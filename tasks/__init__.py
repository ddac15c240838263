"""The roll-out, one step per file; deploy.py is their order."""
