"""What comes out of a model: folders on disk, and texts."""
