"""Tables, plots and nearest neighbours of results."""
