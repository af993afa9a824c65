"""What others made, taken into a dataset: coordinates, pictures of tiles, masks; and back out."""
