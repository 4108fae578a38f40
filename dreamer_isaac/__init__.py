"""dreamer_isaac: Dreamer (model-based reinforcement learning) for GPU robot simulators.

Importing this package imports nothing else: neither torch nor a simulator.
"""

__version__ = "0.1.0"
