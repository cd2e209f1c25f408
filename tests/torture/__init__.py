"""Campaigns of faults against the library: `make torture`. A short form of each is in the suite."""
