"""The training configuration: its schema, and how presets, files and flags become one."""
