"""What one call's inputs say: padding, packing, trees, and the plan that all layers follow."""
