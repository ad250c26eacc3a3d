"""The methods of score distillation, one a file: `registry.names("method")` lists them."""
