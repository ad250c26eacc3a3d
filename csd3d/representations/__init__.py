"""What a scene or an asset is made of: each kind in a file of its own."""
