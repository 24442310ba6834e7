"""What a run takes: closed form, simulation, allocator, and what fits on a card.

The module can be called, for a function of the API has its name: ``peftscope.memory("llama-2-7b", "qlora")``.
"""
