"""Base models: the catalogue, fetching, and loading in each precision."""
