"""dsft: QLoRA fine-tuning of DeepSeek-Coder on one consumer GPU, and the tools around it."""

__version__ = "0.1.0"
