"""What the method must know of a model: its linear layers and adapters, its blocks, and who consumes whose output."""
