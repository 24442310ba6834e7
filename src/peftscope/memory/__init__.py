"""The memory that a step holds: closed form, simulation, and a model of the allocator.

The module can be called, because a function of the API has the same name: ``peftscope.memory("llama-2-7b", "qlora")``.
"""
