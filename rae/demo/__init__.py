"""Both stages on handwritten digits, and the judge of the digits drawn."""
