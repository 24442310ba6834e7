"""peftscope: what is true about LoRA and its relatives, measured."""

__version__ = "0.1.0"
