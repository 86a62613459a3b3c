"""The engine: steps of a rule around a base optimizer, and what they owe the caller."""
