"""Loading models and tokenizers, checking them, quantizing, attaching LoRA."""
