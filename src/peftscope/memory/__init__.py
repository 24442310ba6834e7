"""The memory that a run takes: closed form, simulation, allocator, and what fits on a card.

The module can be called, because a function of the API has the same name: ``peftscope.memory("llama-2-7b", "qlora")``.
"""
