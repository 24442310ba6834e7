"""The machine: cards, processors and devices, what they can do, and meters that read them."""
