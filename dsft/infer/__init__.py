"""`dsft infer`: generate with a base model, an adapter or a merged model."""
