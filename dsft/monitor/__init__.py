"""`dsft monitor`: what GPUs, host and training runs do now; reads only, draws nothing."""
