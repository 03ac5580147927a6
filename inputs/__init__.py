"""What one call's inputs say: padding, packing, trees of texts; checks of arguments."""
