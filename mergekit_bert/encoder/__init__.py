"""The frozen base model: loading it, its sites, its heads, its forward pass."""
