"""The memory calculator as a page: its sources, and what builds it. Nobody who installs the package needs them."""
