"""The methods of score distillation, one per file: `registry.names("method")` lists them."""
