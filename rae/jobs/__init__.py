"""Long jobs split over processes: sampling, reconstructing, reading images."""
