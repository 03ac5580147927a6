"""What Kimi Linear does differently in `generate()`."""
