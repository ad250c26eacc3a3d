"""Hot loops with interchangeable backends, independent of csd3d."""
