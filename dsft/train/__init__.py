"""`dsft train`: fine-tune a model with QLoRA."""
