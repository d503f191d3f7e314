"""The merged model as one GGUF file for llama.cpp, written exactly or refused."""
