"""Hot loops with interchangeable backends; a package of its own that knows nothing of csd3d."""
