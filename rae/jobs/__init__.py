"""Long work shared out over processes: sampling, reconstructing, reading images."""
