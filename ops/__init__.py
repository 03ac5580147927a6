"""The model's operations: each has one entry and all of its implementations in one place."""
