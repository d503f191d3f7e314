"""QLoRA blocks with a backward pass of their own, and what they need; no command, no screen."""
