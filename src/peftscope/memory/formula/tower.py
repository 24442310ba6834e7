"""The weights of a vision tower, which stays frozen, as blocks. No torch."""

from __future__ import annotations

from peftscope.memory.trace import Block, bytes_of, spoken_width
from peftscope.models.stored import Stored
from peftscope.models.vision import Vision

TOWER = "vision tower, frozen"


def tower_blocks(vision: Vision | None, width: float, other: float, stored: Stored | None) -> list[Block]:
    """Returns the weights of a vision tower, by its layers.

    bitsandbytes packs its linear layers as it packs those of the language model. Checkpoints of other formats leave a
    tower in 16 bits.

    Args:
        vision: The tower, if there is one.
        width: The bytes of a weight of a linear layer that is not packed.
        other: The bytes of every other weight.
        stored: How the linear layers of the base are stored, if in few bits.
    """
    if vision is None:
        return []
    packed = stored is not None and stored.name in ("bnb-4bit", "int8")
    parts = stored.parts if stored and packed else {TOWER: width}
    kind = "quantised weights" if packed else "weights"
    layers = [(f"vision_tower.layers.{index}", "W", vision.block) for index in range(vision.layers)]
    projector = [("vision_tower.projector", "X", vision.outside)] if vision.outside else []
    blocks = []
    for module, dim, values in (*layers, *projector):
        for term, each in parts.items():
            formula = f"{spoken_width(each)}·{dim}"
            blocks.append(Block(bytes_of(each, [dim], {dim: values}), kind, module, term, formula))
    size = bytes_of(other, ["Y"], {"Y": vision.other})
    return [*blocks, Block(size, "weights", "vision_tower", TOWER, f"{spoken_width(other)}·Y")]
