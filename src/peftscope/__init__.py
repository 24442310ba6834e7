"""peftscope: what is true about LoRA and its relatives, measured."""

import sys

__version__ = "0.1.0"

# bitsandbytes, as it is imported, and transformers ask the package `kernels`, where it is installed, for native code
# from a hub, which nobody checked. All code of this package comes by here first; None makes its import an error.
sys.modules["kernels"] = None  # type: ignore[assignment]
