"""Models in llama.cpp's format, read to be written in Hugging Face's."""
