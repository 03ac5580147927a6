"""What export_gguf.py does: a folder's model as llama.cpp takes it, converted and checked."""
