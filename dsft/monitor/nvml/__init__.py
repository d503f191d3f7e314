"""GPUs as NVML tells of them; nothing beyond this folder asks the driver."""
