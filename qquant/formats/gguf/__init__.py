"""GGUF: containers, block types, llama.cpp's type mixes, its metadata, importance matrices and shards."""
