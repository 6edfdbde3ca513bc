"""GGUF files of Gemma 4: a strict reader, block formats, metadata, tokenizer, and the conversion to a checkpoint."""
