"""The closed form: what a training step keeps in memory, from the shape of the model alone. No torch.

Written against transformers 5.24, peft 0.21 and bitsandbytes 0.50: each function names the code that it stands for.
It is checked against the simulator, which runs that code itself, and answers at once.
"""
