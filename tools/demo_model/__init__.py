"""The demo model: data generator, tokenizer, training and evaluation (see README.md in this folder)."""
