"""The model's layers: modules with the checkpoint's names; a forward is the report's equations."""
